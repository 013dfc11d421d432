"""Captioning: images become captions, one text file beside each image.

    text             what a captioner said -> what belongs in a caption file
    caption_file     reads and writes ``image.txt``
    caption_log      whose a caption file is: written here, or edited since
    sidecar          the caption files of a dataset: backed up, written, taken back
    captioner        the Captioner protocol, and the loop over a folder
    vision_language  a captioner that asks a model which can look at pictures

Training reads these files and knows nothing of how they came to be.
"""
