"""Captioning: images become captions, one text file beside each image.

    text             what a captioner said -> what belongs in a caption file
    sidecar          reads and writes ``image.txt``
    captioner        the Captioner protocol, and the loop over a folder
    vision_language  a captioner that asks a model which can look at pictures

Training reads these files and knows nothing of how they came to be.
"""
