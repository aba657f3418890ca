"""What a deployed federation stands: kills at every phase of a round, a network that is cut, locked
databases, full disks, hundreds of sites. Each is a trial of ``python -m umbel.deploy.endurance``.
"""
