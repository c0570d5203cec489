"""kelp's commands as Processing algorithms.

Each starts the user's own `kelp` as another program, with an environment of its own: QGIS brings
its own Python, GDAL and PROJ, which would break another installation's.
"""

import os
import shutil
import subprocess
from pathlib import Path

from processing.core.ProcessingConfig import ProcessingConfig, Setting
from qgis.core import (
    QgsApplication,
    QgsProcessing,
    QgsProcessingAlgorithm,
    QgsProcessingException,
    QgsProcessingParameterBoolean,
    QgsProcessingParameterFeatureSource,
    QgsProcessingParameterField,
    QgsProcessingParameterFile,
    QgsProcessingParameterFileDestination,
    QgsProcessingParameterFolderDestination,
    QgsProcessingParameterNumber,
    QgsProcessingParameterVectorDestination,
    QgsProcessingProvider,
    QgsVectorFileWriter,
)

PROGRAM = "KELP_PROGRAM"
FOLDER = QgsProcessingParameterFile.Folder
# Of QGIS's own Python, GDAL and PROJ.
FOREIGN = ("PYTHON", "GDAL", "PROJ", "QGIS", "QT_", "LD_LIBRARY_PATH", "DYLD_")


class KelpPlugin:
    """Adds the provider to Processing."""

    def initProcessing(self):
        """Add the provider; `qgis_process` calls this alone."""
        self.provider = KelpProvider()
        QgsApplication.processingRegistry().addProvider(self.provider)

    def initGui(self):
        """Called when QGIS starts."""
        self.initProcessing()

    def unload(self):
        """Called when the plugin is switched off."""
        QgsApplication.processingRegistry().removeProvider(self.provider)


class KelpProvider(QgsProcessingProvider):
    """The algorithms, and the setting where kelp is."""

    def id(self):
        return "kelp"

    def name(self):
        return "Kelp"

    def load(self):
        ProcessingConfig.settingIcons["Kelp"] = self.icon()
        ProcessingConfig.addSetting(
            Setting("Kelp", PROGRAM, "The program kelp (a path, or its name)", "kelp")
        )
        ProcessingConfig.readSettings()
        self.refreshAlgorithms()
        return True

    def unload(self):
        ProcessingConfig.removeSetting(PROGRAM)

    def loadAlgorithms(self):
        for algorithm in (Predict(), Beds(), Areas()):
            self.addAlgorithm(algorithm)


class KelpAlgorithm(QgsProcessingAlgorithm):
    """A command of kelp: parameters are its options, under their own names."""

    command = ""
    title = ""
    words = ""

    def name(self):
        return self.command

    def displayName(self):
        return self.title

    def shortHelpString(self):
        return self.words

    def createInstance(self):
        return type(self)()

    def run_kelp(self, options, feedback):
        """Run the command; its lines are shown as they come."""
        program = os.environ.get(PROGRAM) or ProcessingConfig.getSetting(PROGRAM) or "kelp"
        if shutil.which(program) is None:
            raise QgsProcessingException(
                f"{program}: no such program. Set the path of kelp in Settings, Options, "
                "Processing, Providers, Kelp."
            )
        arguments = [program, self.command]
        for name, value in options.items():
            if value not in (None, ""):
                arguments += [f"--{name}", str(value)]
        feedback.pushCommandInfo(" ".join(arguments))
        clean = {k: v for k, v in os.environ.items() if not k.startswith(FOREIGN)}
        process = subprocess.Popen(
            arguments, env=clean, text=True, encoding="utf-8", errors="replace",
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        last = ""
        for line in process.stdout:
            last = line.strip() or last
            feedback.pushConsoleInfo(line.rstrip())
            if feedback.isCanceled():
                process.terminate()
        if process.wait() != 0:
            raise QgsProcessingException(last or f"kelp ended with status {process.returncode}")

    def file(self, name, words, **more):
        """Add a parameter that is a file or folder."""
        self.addParameter(QgsProcessingParameterFile(name, words, **more))


class Predict(KelpAlgorithm):
    """`kelp predict`."""

    command = "predict"
    title = "Map kelp in a scene"
    words = (
        "Masks (0 = no kelp, 1 = kelp, 255 = not observed) and probabilities of a Landsat folder, "
        "a GeoTIFF, or a folder of them. An empty network: the one that kelp brings, if any."
    )

    def initAlgorithm(self, configuration=None):
        self.file("data_dir", "Scene, or folder of scenes", behavior=FOLDER)
        self.file("run_dir", "Network (run folder or bundle)", behavior=FOLDER, optional=True)
        self.addParameter(
            QgsProcessingParameterNumber(
                "decision_threshold", "Kelp where the probability is at least this (empty: the "
                "network's)", QgsProcessingParameterNumber.Double, optional=True,
                minValue=0, maxValue=1,
            )
        )  # fmt: skip
        self.addParameter(
            QgsProcessingParameterBoolean("save_probabilities", "Also probabilities", True)
        )
        self.addParameter(QgsProcessingParameterFolderDestination("output_dir", "Maps"))

    def processAlgorithm(self, parameters, context, feedback):
        output = self.parameterAsString(parameters, "output_dir", context)
        threshold = parameters.get("decision_threshold")
        self.run_kelp(
            {
                "data_dir": self.parameterAsFile(parameters, "data_dir", context),
                "run_dir": self.parameterAsFile(parameters, "run_dir", context),
                "decision_threshold": threshold,
                "save_probabilities": self.parameterAsBool(
                    parameters, "save_probabilities", context
                ),
                "output_dir": output,
            },
            feedback,
        )
        for mask in sorted(Path(output).glob("*_kelp.tif")):
            probability = mask.with_name(mask.stem + "_prob.tif")
            if probability.is_file():
                style = Path(__file__).parent / "styles" / "probability.qml"
                shutil.copyfile(style, probability.with_suffix(".qml"))
        return {"output_dir": output}


class Beds(KelpAlgorithm):
    """`kelp beds`."""

    command = "beds"
    title = "Kelp beds as polygons"
    words = (
        "One polygon for each connected patch of kelp, with its areas. Presence area counts pixels "
        "whole: an upper bound. Null is not known, never zero."
    )

    def initAlgorithm(self, configuration=None):
        self.file("predictions_dir", "Folder of maps", behavior=FOLDER)
        self.addParameter(
            QgsProcessingParameterNumber("min_pixels", "Smallest bed, pixels", defaultValue=1)
        )
        self.addParameter(
            QgsProcessingParameterVectorDestination(
                "output", "Beds", QgsProcessing.TypeVectorPolygon
            )
        )

    def processAlgorithm(self, parameters, context, feedback):
        output = self.parameterAsOutputLayer(parameters, "output", context)
        self.run_kelp(
            {
                "predictions_dir": self.parameterAsFile(parameters, "predictions_dir", context),
                "min_pixels": self.parameterAsInt(parameters, "min_pixels", context),
                "output": output,
            },
            feedback,
        )
        style = Path(__file__).parent / "styles" / "beds.qml"
        shutil.copyfile(style, Path(output).with_suffix(".qml"))
        return {"output": output}


class Areas(KelpAlgorithm):
    """`kelp areas`."""

    command = "areas"
    title = "Kelp areas of regions"
    words = (
        "A row for each region and map: areas, observed share, intervals where the network knows "
        "its errors. Where too little was observed everything is null, never zero."
    )

    def initAlgorithm(self, configuration=None):
        self.file("predictions_dir", "Folder of maps", behavior=FOLDER)
        self.addParameter(
            QgsProcessingParameterFeatureSource("aoi", "Regions", [QgsProcessing.TypeVectorPolygon])
        )
        self.addParameter(
            QgsProcessingParameterField("aoi_id", "Column of the regions' ids", None, "aoi")
        )
        self.file("run_dir", "Network (for intervals)", behavior=FOLDER, optional=True)
        self.addParameter(QgsProcessingParameterFileDestination("output", "Table", "CSV (*.csv)"))

    def processAlgorithm(self, parameters, context, feedback):
        output = self.parameterAsFileOutput(parameters, "output", context)
        regions = f"{output}.regions.gpkg"
        source = self.parameterAsSource(parameters, "aoi", context)
        options = QgsVectorFileWriter.SaveVectorOptions()
        writer = QgsVectorFileWriter.create(
            regions, source.fields(), source.wkbType(), source.sourceCrs(),
            context.transformContext(), options,
        )  # fmt: skip
        for feature in source.getFeatures():
            writer.addFeature(feature)
        del writer  # writes the file
        try:
            self.run_kelp(
                {
                    "predictions_dir": self.parameterAsFile(parameters, "predictions_dir", context),
                    "aoi": regions,
                    "aoi_id": self.parameterAsString(parameters, "aoi_id", context),
                    "run_dir": self.parameterAsFile(parameters, "run_dir", context),
                    "output": output,
                },
                feedback,
            )
        finally:
            Path(regions).unlink(missing_ok=True)
        return {"output": output}
