"""What the engine benchmark is made of: work, systems, processes, environments, pictures."""
