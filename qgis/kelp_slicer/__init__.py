"""QGIS plugin: kelp's commands as Processing algorithms."""


def classFactory(iface):
    """The plugin; QGIS calls this."""
    from .plugin import KelpPlugin

    return KelpPlugin()
