"""Makes tests/serve/parsers/golden/harmony.json with OpenAI's package for the format of gpt-oss.

Run by hand, in an environment of its own (the package is no dependency of dance_jax):
    pip install openai-harmony==0.0.8
    python tests/reference/make_harmony.py
The package downloads its vocabulary. Without a network, TIKTOKEN_ENCODINGS_BASE names a folder with
o200k_base.tiktoken; the wheel of litellm has this file under litellm_core_utils/tokenizers.
"""

import json
import pathlib

from openai_harmony import (
    Conversation,
    HarmonyEncodingName,
    Message,
    Role,
    StreamableParser,
    load_harmony_encoding,
)

GOLDEN = pathlib.Path(__file__).parents[1] / "serve" / "parsers" / "golden" / "harmony.json"
ENCODING = load_harmony_encoding(HarmonyEncodingName.HARMONY_GPT_OSS)


def said(channel, text):
    return Message.from_role_and_content(Role.ASSISTANT, text).with_channel(channel)


def called(name, arguments):
    message = said("commentary", arguments).with_recipient(f"functions.{name}")
    return message.with_content_type("<|constrain|>json")


USER = Message.from_role_and_content(Role.USER, "What is the weather in Paris?")
PARIS = '{"city": "Paris", "days": 3}'
#: Answers that the package renders itself.
RENDERED = {
    "content only": [said("final", "It is sunny.\n\n1 < 2 <| é ✓")],
    "reasoning and content": [said("analysis", "Easy.\n"), said("final", "It is sunny.")],
    "reasoning and a call": [said("analysis", "I need a tool."), called("get_weather", PARIS)],
    "content before a call": [
        said("analysis", "I need a tool."),
        said("commentary", "I look it up."),
        called("get_weather", PARIS),
    ],
    "parallel calls": [called("get_weather", PARIS), called("now", "{}"), called("unknown", "{}")],
    "reasoning twice": [
        said("analysis", "First."),
        said("commentary", "I look."),
        said("analysis", "Second."),
        said("final", "Sunny."),
    ],
}
#: Answers as models write them, with other headers or no last token.
WRITTEN = {
    "the recipient follows the channel": "<|channel|>analysis<|message|>Hm.<|end|>"
    "<|start|>assistant<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>"
    + PARIS,
    "the recipient follows the role": " to=functions.get_weather<|channel|>commentary "
    f"<|constrain|>json<|message|>{PARIS}",
    "a bare type of content": "<|channel|>commentary to=functions.now json<|message|>{}<|call|>",
    "no type of content": "<|channel|>commentary to=functions.now<|message|>{}<|call|>",
    "a call in the channel of the reasoning": "<|channel|>analysis to=functions.now code<|message|>"
    "{}",
    "structured output": '<|channel|>final <|constrain|>json<|message|>{"sunny": true}<|return|>',
    "no channel": "<|message|>It is sunny.<|return|>",
    "cut off in the reasoning": "<|channel|>analysis<|message|>The user wan",
    "cut off in the content": "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant"
    "<|channel|>final<|message|>It is",
    "cut off in the arguments": "<|channel|>commentary to=functions.get_weather "
    '<|constrain|>json<|message|>{"city": "Pa',
}


def rendered(messages):
    """The text of the prompt, and what follows it."""
    prompt = ENCODING.render_conversation_for_completion(
        Conversation.from_messages([USER]), Role.ASSISTANT
    )
    whole = ENCODING.decode_utf8([token for each in messages for token in ENCODING.render(each)])
    return ENCODING.decode_utf8(prompt), whole.removeprefix("<|start|>assistant")


def parsed(text):
    """Messages that the package finds in a text."""
    parser = StreamableParser(ENCODING, Role.ASSISTANT)
    for token in ENCODING.encode(text, allowed_special="all"):
        parser.process(token)
    parser.process_eos()
    return parser.messages


def is_call(message):
    return (message.recipient or "").startswith("functions.")


def case(name, prompt, text):
    messages = parsed(text)
    texts = [message for message in messages if not is_call(message)]
    return {
        "name": name,
        "prompt": prompt,
        "text": text,
        "content": joined(each for each in texts if each.channel != "analysis"),
        "reasoning": joined(each for each in texts if each.channel == "analysis"),
        "calls": [
            {
                "name": message.recipient.removeprefix("functions."),
                "arguments": message.content[0].text,
            }
            for message in messages
            if is_call(message)
        ],
    }


def joined(messages):
    return "\n".join(message.content[0].text for message in messages)


def main():
    prompt, _ = rendered([])
    cases = [case(name, *rendered(messages)) for name, messages in RENDERED.items()]
    cases += [case(name, prompt, text) for name, text in WRITTEN.items()]
    contents = {"tools": "harmony", "reasoning": "harmony", "cases": cases}
    text = json.dumps(contents, indent=1, ensure_ascii=False)
    GOLDEN.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
