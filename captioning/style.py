"""What a captioner is asked: the style of the base model, and what the LoRA is for."""

SENTENCES, TAGS = "sentences", "tags"
STYLES = (SENTENCES, TAGS)
GENERAL, PERSON, OBJECT, STYLE, CONCEPT, PLACE = "general", "person", "object", "style", "concept", "place"
TAG_ENCODERS = frozenset(["clip_l", "clip_g", "clip_h"])
"""Text encoders that read words rather than grammar; a model that has a T5 or an LLM beside them reads sentences."""

DESCRIBED = {
    GENERAL: "the subject, clothing, pose, expression, framing, camera angle, light and background",
    PERSON: "clothing, pose, expression, actions, other people, framing, camera angle, light and background",
    OBJECT: "where it is, what is around it, who holds or uses it, framing, camera angle, light and background",
    STYLE: "who or what is shown, what they do, clothing, place, framing and time of day",
    CONCEPT: "who or what is shown, clothing, place, framing, camera angle, light and background",
    PLACE: "people and things that come and go, weather, season, time of day, framing, camera angle and light",
}
UNSAID = {
    GENERAL: "",
    PERSON: "Call the person '{class_word}' and say nothing about face, hair, age or origin.",
    OBJECT: "Call it '{class_word}' and say nothing about its own shape, colour, material or brand.",
    STYLE: "Say nothing about how it is made: no medium, technique, colours, artist or art style.",
    CONCEPT: "Call what all such pictures share '{class_word}' and do not explain it.",
    PLACE: "Call the place '{class_word}' and say nothing about what is always there, such as its buildings.",
}
"""What the trigger word is to stand for: described in captions, it would be tied to those words instead."""
CLASS_WORDS = {PERSON: "person", OBJECT: "object", CONCEPT: "concept", PLACE: "place"}
PURPOSES = tuple(DESCRIBED)
ASKED = {
    SENTENCES: (
        "Describe this picture in one short paragraph for training an image model. State plainly what is visible: "
        "{described}. {unsaid} No opinions, no guesses, no 'this image shows', no remarks about resolution or "
        "watermarks."
    ),
    TAGS: (
        "List 10 to 30 short comma-separated tags for what is visible in this picture: {described}. {unsaid} Only the "
        "tags, no sentences."
    ),
}
HINT = "A tagger saw the following, not all of it right: {tags}. Use what you can see in the picture yourself."


def instruction(style: str, purpose: str = GENERAL, class_word: str = "") -> str:
    """What to ask a model about each picture, so that the LoRA learns what is left unsaid."""
    unsaid = UNSAID[purpose].format(class_word=class_word or CLASS_WORDS.get(purpose, ""))
    return " ".join(ASKED[style].format(described=DESCRIBED[purpose], unsaid=unsaid).split())


def style_of(encoders: set[str]) -> str:
    """The style that suits an image model with text encoders of these names: tags where all it has is CLIP."""
    return TAGS if encoders and encoders <= TAG_ENCODERS else SENTENCES
