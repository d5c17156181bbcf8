"""The watch over the ranks of a run: a heartbeat of each, and the judgement of who is lost or silent."""
