"""ZeRO stage 3: parameters that are gathered on demand. (Stages 1 and 2 are slices, in `chunk` and `optim`.)"""
