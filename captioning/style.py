"""What a captioner is asked: the style of the captions."""

SENTENCES, TAGS = "sentences", "tags"
INSTRUCTIONS = {
    SENTENCES: (
        "Describe this picture in one short paragraph for training an image model. State plainly what is visible: "
        "the subject, clothing, pose, expression, framing, camera angle, light and background. "
        "No opinions, no guesses, no 'this image shows', no remarks about resolution or watermarks."
    ),
    TAGS: (
        "List 10 to 30 short comma-separated tags for what is visible in this picture: subject, clothing, pose, "
        "expression, framing, light, background. Only the tags, no sentences."
    ),
}
