"""The live executor: replicas on Ray send each row as a request."""
