"""Prompts of DreamBooth (Ruiz et al., 2022, arXiv:2208.12242) and Textual Inversion (Gal et al., 2022, arXiv:2208.01618)."""

import re

from imprompt.errors import UserError


def format_class_prompt(class_noun: str) -> str:
    """The prompt of class images: "a photo of a cat"."""
    return f"a photo of {'an' if class_noun[:1].lower() in 'aeiou' else 'a'} {class_noun}"


def format_instance_prompt(token: str, class_noun: str = "") -> str:
    """The prompt of instance images: an identifier before the class noun (DreamBooth), or a placeholder instead (Textual Inversion)."""
    return f"a photo of a {token} {class_noun}".rstrip()


def insert_subject_token(prompt: str, class_noun: str, token: str, *, replace_noun: bool = False) -> str:
    """Insert the subject into a prompt: "a cat on a beach" becomes "a sks cat on a beach"; `*` stands for token and noun.

    With `replace_noun` the token replaces the class noun, as a placeholder of Textual Inversion does: "a <subject> on a beach". Only
    the first occurrence is changed; a prompt that contains the subject already is returned as it is. Raises UserError where the
    prompt contains neither the noun nor `*`.
    """
    subject = token if replace_noun else f"{token} {class_noun}"
    if "*" in prompt:
        return prompt.replace("*", subject, 1)
    if re.search(rf"(?<!\w){re.escape(subject)}(?!\w)", prompt):
        return prompt
    noun = re.compile(rf"(?<!\w){re.escape(class_noun)}(?!\w)", re.IGNORECASE)
    if not class_noun or not noun.search(prompt):
        raise UserError(f"prompt: expected the word {class_noun!r}, or * in place of the subject; received {prompt!r}")
    return noun.sub(lambda _: subject, prompt, count=1)
