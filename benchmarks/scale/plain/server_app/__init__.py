"""Flower's own FedAvg: the ServerApp."""
