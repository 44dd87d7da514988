"""The losses in the slots of trainers: one small module per framework, which is imported only when it is used.

    from fused_losses.adapters import trl

    trl.install()  # and trl.remove()

Each has the framework's exact signatures, gives the numbers of the code that it replaces, refuses by name what it does
not support, and speaks of what its user gave in the framework's words. ``python -m fused_losses.adapters`` runs each
framework that is installed beside it.
"""
