"""A plan as data, and its proof: what every rank of the pipe computes, sends and receives, and when."""
