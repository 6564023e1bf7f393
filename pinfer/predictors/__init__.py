"""How predictors are made: samples, fits and thresholds."""
