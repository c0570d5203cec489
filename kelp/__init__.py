"""kelp finds small things in big satellite images: sliced training and prediction.

Importing this package is light; torch and rasterio are imported on first use.
"""

__version__ = "0.1.0"
