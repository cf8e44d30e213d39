"""The live executor: Ray actors that lease rows to engine replicas."""
