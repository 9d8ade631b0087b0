"""Flower's own FedAvg: the ClientApp."""
