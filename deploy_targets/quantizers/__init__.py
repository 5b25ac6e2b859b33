"""Checkpoint formats, one file each, behind `deploy_targets.protocols.Quantizer`."""
