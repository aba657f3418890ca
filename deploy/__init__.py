"""Floor 6: processes, certificates, containers."""
