"""Training of predictors: samples, fits and thresholds."""
