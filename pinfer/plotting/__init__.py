"""The pictures of `pinfer plot`: what they show, and how they are drawn."""
