"""Mixture of experts: routers, experts, balance loss."""
