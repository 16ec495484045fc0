"""family/chat_template.py: the texts of transformers for published templates; hostile templates end in a sentence."""

import itertools
import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import transformers

from family import chat_template
from family.chat_template import JinjaTemplate
from hub.chat_template import FILES, find_chat_template
from hub.files import BUNDLED

QWEN = (  # llava-hf/llava-interleave-qwen-0.5b-hf
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + ' '}}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ '\\n' + content['text'] }}"
    "{% endfor %}{{'<|im_end|>'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}"
)
VICUNA = (  # llava-hf/llava-1.5-7b-hf and llava-v1.6-vicuna-7b-hf
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{# Render all images first #}{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}{# Render all text next #}{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}"
    "{% endfor %}{% else %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
MISTRAL = (  # llava-hf/llava-v1.6-mistral-7b-hf
    "{% for message in messages %}{% if message['role'] == 'system' %}"
    "{{ '<<SYS>>\n' + message['content'][0]['text'] + '\n<</SYS>>\n\n' }}{% elif message['role'] == 'user' %}"
    "{{ '[INST] ' }}{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}"
    "{% endfor %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] }}"
    "{% endfor %}{{' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ ' ' + message['content'][0]['text'] + '</s> '}}{% else %}"
    "{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
LLAMA_3 = (  # for contents that are texts
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
PHI_3 = (  # for contents that are texts; a list raises a TypeError inside the template
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') %}{{'<|user|>' + '\n' + "
    "message['content'] + '<|end|>' + '\n' + '<|assistant|>' + '\n'}}{% elif (message['role'] == 'assistant') %}"
    "{{message['content'] + '<|end|>' + '\n'}}{% endif %}{% endfor %}"
)
MISTRAL_TEXT = (  # Mistral-7B-Instruct: roles must alternate
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token}}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
EVERYTHING = """{%- set ns = namespace(pictures=0, said=[]) %}
{%- macro part(x) %}<{{ x.type }}>{% endmacro %}
    {% if tools is none and documents is defined and not nothing %}
    no tools
    {% endif %}
{% for message in messages if message.role != 'system' %}
    {% if loop.index > 3 %}{% break %}{% endif %}
    {% if message.content is string %}{% set content = [{'type': 'text', 'text': message.content}] %}
    {% else %}{% set content = message['content'] %}{% endif %}
    {% for x in content %}{% set ns.pictures = ns.pictures + (x.type == 'image') %}{{ part(x) }}{% endfor %}

    {% generation %}{% set inside = 1 %}{{ message | tojson }}{% endgeneration %}{{ inside }}
{% endfor %}
{{ {'b': [1, "ä<'"], 'a': ns.pictures} | tojson(indent=1, sort_keys=true) }} {{ '%05.1f' | format(2) }} {{ "é" }}
{{- dict(a=1).items() | list }} {{ messages[0]['no_such_key'] }} {{ messages[-1].role.title()[:3] ~ eos_token * 2 }}
{{ strftime_now('%Y') }}
"""
BUNDLED_TEMPLATE = (BUNDLED / "chat_template.jinja").read_text()
TEMPLATES = {"bundled": BUNDLED_TEMPLATE, "qwen": QWEN, "vicuna": VICUNA, "mistral": MISTRAL, "llama 3": LLAMA_3}
TEMPLATES |= {"phi 3": PHI_3, "mistral text": MISTRAL_TEXT, "everything": EVERYTHING}


def said(role, content, pictures=0):
    if pictures:
        content = [{"type": "image"}] * pictures + [{"type": "text", "text": content}]
    return {"role": role, "content": content}


TEXTS = [said("user", " What is this? "), said("assistant", 'A <b>"cat"</b>\n'), said("user", "Où? 猫 {{ x }}")]
PARTS = [
    {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
    said("user", "What is this?", 2),
    {"role": "assistant", "content": [{"type": "text", "text": "A cat."}, {"type": "text", "text": "Two."}]},
    {"role": "user", "content": [{"type": "text", "text": "And"}, *said("user", "here?", 1)["content"]]},
]
CONVERSATIONS = {
    "one text": (TEXTS[:1], True),
    "texts": (TEXTS, True),
    "a system text": ([said("system", "Be brief."), *TEXTS, said("assistant", "There.")], False),
    "pictures": (PARTS[1:2], True),
    "parts": (PARTS, False),
    "mixed": ([said("system", "Be brief."), *PARTS[1:3], TEXTS[2]], True),
}


@pytest.fixture(scope="module")
def processor():
    return transformers.AutoProcessor.from_pretrained(BUNDLED)


def outcome(render, *errors):
    """The text, or None for an error."""
    try:
        return render()
    except errors:
        return None


@pytest.mark.parity
@pytest.mark.parametrize("name", TEMPLATES)
def test_the_text_is_that_of_transformers(name, processor):
    ours = JinjaTemplate(TEMPLATES[name], **processor.tokenizer.special_tokens_map)
    texts = []
    for messages, prompt in CONVERSATIONS.values():
        options = {"chat_template": TEMPLATES[name], "add_generation_prompt": prompt}
        expected = outcome(lambda: processor.apply_chat_template(messages, **options), Exception)  # noqa: B023
        texts.append(outcome(lambda: ours.run(messages, prompt), ValueError))  # noqa: B023
        assert texts[-1] == expected
    assert sum(text is not None for text in texts) >= 2  # contents of the kind that it expects


@pytest.mark.parity
@pytest.mark.parametrize("name", ["llama 3", "phi 3"])
def test_a_template_for_texts_gets_texts(name, processor):
    ours, messages = JinjaTemplate(TEMPLATES[name], **processor.tokenizer.special_tokens_map), PARTS[1:2]
    texts = [{"role": "user", "content": "<image>\n<image>\nWhat is this?"}]
    expected = processor.apply_chat_template(texts, chat_template=TEMPLATES[name], add_generation_prompt=True)
    assert ours.render(messages, True) == ours.render(texts, True) == expected


@pytest.mark.parity
def test_a_picture_or_an_extra_key_in_a_message(processor):
    messages = [said("user", "Hi", 1) | {"name": "Ann", "tool_calls": None}]
    messages[0]["content"][0] = {"type": "image", "image": object(), "url": "x.png"}
    source = "{{ messages | tojson }}"
    expected = processor.apply_chat_template(messages, chat_template=source)
    assert JinjaTemplate(source).run(messages, False) == expected and "<object>" in expected


@pytest.mark.parity
def test_which_file_holds_the_template_in_transformers_order(tmp_path):
    for names in itertools.chain.from_iterable(itertools.combinations(FILES, n) for n in range(5)):
        folder = tmp_path / "+".join(["folder", *names])
        shutil.copytree(BUNDLED, folder, ignore=shutil.ignore_patterns("*.safetensors", "chat_template.*"))
        for name in names:
            if name.endswith(".jinja"):
                (folder / name).write_text(f"from {name}\r\n\u00e9", "utf-8")
            else:
                settings = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
                (folder / name).write_text(json.dumps(settings | {"chat_template": f"from {name}"}))
        theirs = transformers.AutoProcessor.from_pretrained(folder)
        assert find_chat_template(folder) == (theirs.chat_template or theirs.tokenizer.chat_template)


@pytest.mark.quick
def test_named_templates_and_settings_that_are_none(tmp_path):
    def found(template):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
        return find_chat_template(tmp_path)

    assert find_chat_template(tmp_path) is None and found(None) is None and found("") is None
    both = [{"name": "tool_use", "template": "A"}, {"name": "default", "template": "B"}]
    assert found(both) == "B" and found({"default": "C"}) == "C"
    for bad in (3, [], both[:1], ["default"], {"other": "D"}, [{"name": "default", "template": 3}], {"default": [1]}):
        with pytest.raises(ValueError, match=r"tokenizer_config.json: chat_template must be a text"):
            found(bad)
    with pytest.raises(ValueError, match=r"tokenizer_config.json: the chat template has 100001 characters"):
        found("a" * 100_001)
    (tmp_path / "chat_template.jinja").write_text("a" * 100_001)
    with pytest.raises(ValueError, match=r"chat_template.jinja: the chat template has 100001 characters"):
        find_chat_template(tmp_path)
    (tmp_path / "chat_template.json").write_text("{")
    with pytest.raises(ValueError, match=r"chat_template.json is not valid JSON"):
        find_chat_template(tmp_path)


def refused(source, why="", messages=TEXTS):
    start = time.monotonic()
    with pytest.raises(ValueError) as caught:
        JinjaTemplate(source, "folder/chat_template.jinja").render(messages)
    message = str(caught.value)
    assert message.startswith("folder/chat_template.jinja: ") and why in message and "\n" not in message, message
    assert len(message) < 500 and time.monotonic() - start < 10


BIG = "{% set n = namespace(x='a', y=['a']) %}"
HOSTILE = {
    "range": ("{% for i in range(10**9) %}{% endfor %}", "Range too big"),
    "loops": ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "more than 2 seconds"),
    "*": ("{{ 'a' * 10**12 }}", ""),
    "**": ("{{ 10 ** (10 ** 9) }}", "more than 2 seconds"),
    "~": (BIG + "{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}", ""),
    "a list in a list": (BIG + "{% for i in range(60) %}{% set n.y = [n.y, n.y] %}{% endfor %}{{ n.y }}", ""),
    "replace": ("{% set a = 'a' * 10**6 %}{{ a | replace('a', a) }}", ""),
    "format": ("{{ '%1000000000000d' | format(1) }}", ""),
    "join": ("{{ range(99999) | join('a' * 10**6) }}", ""),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    "a tree of calls": ("{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(99) }}", ""),
    "output": ("{% for i in range(99999) %}{{ 'a' * 11 }}{% endfor %}", "more than 1000000 characters"),
    "parentheses": ("{{ " + "(" * 9999 + "1" + ")" * 9999 + " }}", "recursion"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_ends_in_a_sentence(name):
    refused(*HOSTILE[name])


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("a\n{% for %}", "Expected an expression, got 'end of statement block' in line 2"),
        ("{{ ''.__class__.__mro__ }}", "access to attribute '__class__' of 'str' object is unsafe"),
        ("{{ messages.append(1) }}", "access to attribute 'append' of 'list' object is unsafe"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{{ nothing.more }}", "'nothing' is undefined"),
        ("{{ messages[0].content + 1 }}", "can only concatenate str"),
        ("{{ raise_exception('Roles must\nalternate') }}", "Roles must alternate"),
        ("{{ 1 | no_such_filter }}", "No filter named 'no_such_filter'"),
    ],
)
def test_a_template_that_fails_ends_in_a_sentence(source, why):
    refused(source, why)


@pytest.mark.quick
def test_a_namespace_has_no_methods_of_the_template():
    made = chat_template.sandbox("2000-01-01").globals["namespace"]({"y": 2}, __html__=len, x=1)
    assert (made.x, made.y) == (1, 2) and not hasattr(made, "__html__") and not hasattr(made, "z")


@pytest.mark.quick
@pytest.mark.parametrize("messages", [[], ["Hi"], [said("tool", "Hi")], [said("user", 3)], [said("user", [{}])]])
def test_malformed_messages_are_refused(messages):
    with pytest.raises(ValueError):
        JinjaTemplate("{{ messages }}").render(messages)


def test_jinja2_missing_or_too_old(tmp_path, monkeypatch):
    (tmp_path / "jinja2.py").write_text("raise ImportError('No module named jinja2')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    refused("not rendered before", "pip install -r requirements-family.txt")
    monkeypatch.setattr(chat_template, "version", lambda name: "3.1.5rc1")
    with pytest.raises(ImportError, match="not safe"):
        chat_template.render_in_sandbox("", {}, "2000-01-01")


def test_threads_and_text_outside_ascii():
    messages = [said("user", "é 猫 \udcff \ue000 \\ ' \0")]
    with ThreadPoolExecutor(2) as pool:
        texts = [f"{i}" + "{{ messages[0].content }}" for i in range(4)]
        rendered = list(pool.map(lambda text: JinjaTemplate(text).render(messages), texts))
    assert rendered == [f"{i}" + messages[0]["content"] for i in range(4)]


def test_the_same_prompt_is_rendered_once():
    template, before = JinjaTemplate("{{ messages[0].content }} again"), chat_template.render_in_child.cache_info().hits
    assert template.render(TEXTS) == template.render(TEXTS) == " What is this?  again"
    assert chat_template.render_in_child.cache_info().hits == before + 1
