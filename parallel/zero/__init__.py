"""ZeRO: what every replica would hold, divided over the replicas."""
