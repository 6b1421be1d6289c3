"""Dialogue data, models and metrics; import its modules one by one, since each needs only some of the extras."""
