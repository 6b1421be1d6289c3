"""What all ops share: the interface of the four rules, the autograd Functions built from them, backends, and checks."""
