"""Dialogue data, models, training and evaluation. Import the modules one by one: each needs only some of the extras."""
