import pytest

from pixart.data.caption_checks import Problem, problem, sentences_of, short_form

GOOD = """
A red circle on the left of a white background.
An image sensor on a green circuit board, lit from above.
A sign that reads 'I cannot wait', black letters on yellow wood.
A photo of a brown bear.
Two dogs, one black, one white, on a beach under dark clouds.
A picture frame of gilded wood on a grey wall.
A painting of two people at a table by a window, in oil.
A scenic coast with cliffs, photographed from a boat.
A drawing table with a lamp. The table is of oak.
Sorry! is printed in large letters on a board game box.
A woman with a sorry look, in a blue coat, beside a bus stop.
An AI conference banner above a stage, purple light.
Three books, three cups and three pens on a desk, in rows of three.
A very, very small frog on a leaf.
A man in a white shirt and a man in a black shirt at a wooden table.
A bowl of soup. A spoon beside the bowl. Steam above the bowl.
No parking sign on a brick wall.
A camera on a tripod shows a mountain on its screen.
A seashell, a shell of a crab and a shell of an egg.
A close-up of a dandelion clock; seeds drift to the right.
New York, New York, a neon sign in pink and blue.
A 35 mm film strip with five frames of a running horse.
Eine Katze auf einem roten Sofa.
Here, a wooden signpost with painted letters, stands at a crossroads.
""".strip().splitlines()

BAD = [
    ("", Problem.EMPTY),
    (" \n.", Problem.EMPTY),
    ("...", Problem.EMPTY),
    ("I'm sorry, but I can't help with that.", Problem.REFUSAL),
    ("I\u2019m sorry, I cannot identify people.", Problem.REFUSAL),
    ("I cannot describe this image.", Problem.REFUSAL),
    ("As an AI language model, I do not see pictures.", Problem.REFUSAL),
    ("Unfortunately, I am unable to view it.", Problem.REFUSAL),
    ("I am unable to see the picture.", Problem.REFUSAL),
    ("There is no image attached.", Problem.REFUSAL),
    ("Please provide an image.", Problem.REFUSAL),
    ("The image shows a dog on a beach.", Problem.NARRATION),
    ("This image depicts two people.", Problem.NARRATION),
    ("The photograph captures a sunset.", Problem.NARRATION),
    ("In this photo we see a red car.", Problem.NARRATION),
    ("In the picture, a cat sleeps.", Problem.NARRATION),
    ("This black and white photo features a bridge.", Problem.NARRATION),
    ("We can see a house on a hill.", Problem.NARRATION),
    ("The scene depicts a market.", Problem.NARRATION),
    ("This is an image of a dog.", Problem.NARRATION),
    ("Sure! A dog on a beach.", Problem.NARRATION),
    ("Caption: a dog on a beach.", Problem.NARRATION),
    ("Here is a caption: a dog.", Problem.NARRATION),
    ("the the the the the", Problem.REPETITION),
    ("A dog dog dog dog on a beach.", Problem.REPETITION),
    ("A man on a bench. A man on a bench.", Problem.REPETITION),
    ("red ball on grass red ball on grass red ball on grass red ball on grass", Problem.REPETITION),
    ('{"caption": "a dog"}', Problem.NO_TEXT),
    ("- a dog\n- a ball", Problem.NO_TEXT),
    ("1. A dog on a beach", Problem.NO_TEXT),
    ("**A dog** on a beach", Problem.NO_TEXT),
    ("<|im_start|>assistant a dog", Problem.NO_TEXT),
    ("```a dog```", Problem.NO_TEXT),
    ("A dog\x07 on a beach", Problem.NO_TEXT),
    ("A dog \ufffd on a beach", Problem.NO_TEXT),
]


@pytest.mark.parametrize("text", GOOD)
def test_captions_that_are_good(text):
    assert problem(text) is None


@pytest.mark.parametrize(("text", "wanted"), BAD)
def test_captions_that_are_not(text, wanted):
    assert problem(text) == wanted


def test_cut_comes_last():
    assert problem("A dog that runs along the", cut=True) == Problem.CUT
    assert problem("", cut=True) == Problem.EMPTY


def test_sentences_and_the_short_form():
    text = "A red ball, on a lawn. It is large! Light comes from the left."
    assert sentences_of(text) == ["A red ball, on a lawn.", "It is large!", "Light comes from the left."]
    assert short_form(text) == "A red ball, on a lawn."
    assert short_form("") == ""
    assert short_form(" A 2.5 m door! Is it open? ") == "A 2.5 m door!"
    assert short_form("no sentence at all") == "no sentence at all"
    long = "A red ball on a lawn, " + "with many words " * 10
    assert short_form(long) == "A red ball on a lawn"
    assert short_form("word " * 40) == " ".join(["word"] * 25)
