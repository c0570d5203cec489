"""Real scenes: what satellites deliver, read as it was delivered.

`find_scenes` says which scenes a path means, `open_scene` opens one of them for reading by windows,
whatever it is: a raster, a Landsat folder or archive, an HLS granule, a Sentinel-2 product, a STAC
item. No torch.
"""

from kelp.sensors.opening import find_scenes, open_scene, scene_name
from kelp.sensors.scene import SensorScene
from kelp.sensors.stac import is_item

__all__ = ["SensorScene", "find_scenes", "is_item", "open_scene", "scene_name"]
