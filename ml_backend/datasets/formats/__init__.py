"""Formats of labelled data sets, one file each.

`ml_backend.extensions.DATASET_FORMATS` names the formats. A new one is a subclass of
`base.DatasetFormat` in a file of its own, and one line there (or an entry point in the group
`ml_backend.dataset_formats`).

Libraries that were considered:
    - Pascal VOC uses torchvision's `parse_voc_xml`, behind defusedxml.
    - Label Studio's export uses the controls that trainings use. An export has no label config, so
      the controls are derived from its results.
    - COCO and YOLO have short readers of their own. label-studio-sdk's converters write files and
      print advice; the COCO one fails on crowds and on images without a size, the YOLO one reads
      polygons as boxes and has no splits. The loaders of faster-coco-eval, supervision and globox
      stop at the first bad entry instead of counting it; supervision also needs FFmpeg, and decodes
      every image of a VOC data set.
"""
