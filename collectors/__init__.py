"""Collectors: measure grouped GEMMs and MoE layers on this machine and leave a capture folder (docs/captures.md).

The only code of the project that imports torch; torch, numpy and the standard library are all it needs. Planning,
storing and describing the machine work without torch.
"""
