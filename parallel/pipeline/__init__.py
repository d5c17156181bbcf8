"""Pipeline parallelism: a plan is generated (`schedule`), drawn (`picture`, `drawing`) and executed (`runner`).

The counterpart is torch.distributed.pipelining.
"""
