"""Forecasting models: network, features, baselines, calibration, registry."""
