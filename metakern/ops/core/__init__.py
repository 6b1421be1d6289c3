"""What the ops are made of: the four rules, the autograd Functions that follow from them, backends, checks."""
