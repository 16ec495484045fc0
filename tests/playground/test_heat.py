"""benchmarks/heat.py: which tokens spell a name, which patches a thing covers, and that the answer is the likeliest."""

from benchmarks import heat
from hub.files import BUNDLED
from llava import LlavaForConditionalGeneration, LlavaProcessor
from tokenizer import Tokenizer

TOKENIZER = Tokenizer.from_pretrained(BUNDLED)


def test_the_tokens_of_a_name_and_the_patches_of_a_thing():
    ids = TOKENIZER.encode("The picture shows a cat and an apple.", add_special_tokens=False)
    found = heat.tokens_of("apple", ids, TOKENIZER)
    assert TOKENIZER.decode([ids[i] for i in found]).strip() == "apple"
    assert not heat.tokens_of("dog", ids, TOKENIZER) and not heat.tokens_of("app", ids, TOKENIZER)
    ids = TOKENIZER.encode("I see a hot dog, a fire truck and a Ferris wheel.", add_special_tokens=False)
    spelt = lambda name: TOKENIZER.decode([ids[i] for i in heat.tokens_of(name, ids, TOKENIZER)]).strip()  # noqa: E731
    for name in ("hot dog", "fire truck", "Ferris wheel", "dog", "fire"):
        assert spelt(name) == ("" if name in ("dog", "fire") else name)
    thing = {"x": 0.75, "y": 0.25, "size": 0.5}
    assert heat.covered(thing, 4).reshape(4, 4).nonzero().tolist() == [[0, 2], [0, 3], [1, 2], [1, 3]]
    assert all(heat.has_two(truth) for _, truth in heat.scenes(3, 28))


def test_the_heat_is_that_of_the_likeliest_answer():
    model, processor = LlavaForConditionalGeneration.from_pretrained(BUNDLED), LlavaProcessor.from_pretrained(BUNDLED)
    greedy = heat.measure(model, processor, 2)
    model.generation_config |= {"do_sample": True, "temperature": 100.0}
    assert str(heat.measure(model, processor, 2)) == str(greedy)
