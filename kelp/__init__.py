"""kelp finds small things in big satellite images: sliced training and prediction.

Importing this package is light: the functions that `__init__.pyi` lists are imported on first use.

    import kelp

    bundle = kelp.load_bundle("mlruns/kelp/<run>")
    p = kelp.predict_array(bundle, scene)  # (bands, h, w) raw values -> (h, w) probabilities
    kelp.predict(bundle, "scene.tif", "scene_kelp.tif", tile=128, overlap=64, blend="hann")
    kelp.predict_scenes(kelp.config.PredictConfig(data_dir=..., output_dir=..., run_dir=...))
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
