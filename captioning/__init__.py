"""Captioning: images become captions, one text file beside each image.

    captioner        the Captioner protocol, and the loop over the pictures of a folder
    opening, wd_tagger, chat_model, florence, blip, server, vision_language    the captioners there are
    hinted, later    captioners made of others
    style, request   what they are asked
    text, tags, trigger, exclusion, replacement, finish    what they said -> the caption
    caption_file, caption_log, sidecar    the files: whose each is, backed up, written, taken back

Training reads these files and knows nothing of how they came to be.
"""
