"""The configuration of every command: one declaration per option.

`kelp.cli` builds flags, help and validation from these classes; Python users construct them
(`kelp.config.SliceConfig(data_dir=..., ...)`) and pass them to the function of the command.

A class is imported on first use: a command builds only its own.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
