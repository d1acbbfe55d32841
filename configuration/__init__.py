"""Configurations and presets."""
