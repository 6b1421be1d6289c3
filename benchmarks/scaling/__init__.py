"""Training over several processes: is it the same training, what does it cost, and how far does it go."""
