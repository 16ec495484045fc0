"""The things of the emoji world: their names, their emoji, and their plurals and numbers in English."""

from collections import Counter

KINDS = {  # kind -> its things, each as a name and the emoji that shows it
    "animal": "dog 🐶, cat 🐱, mouse 🐭, rabbit 🐰, fox 🦊, bear 🐻, panda 🐼, koala 🐨, tiger 🐯, lion 🦁, "
    "cow 🐮, pig 🐷, frog 🐸, monkey 🐵, horse 🐴, zebra 🦓, deer 🦌, elephant 🐘, hippo 🦛, giraffe 🦒, "
    "kangaroo 🦘, camel 🐪, sheep 🐑, hedgehog 🦔, squirrel 🐿, bat 🦇, chicken 🐔, penguin 🐧, duck 🦆, owl 🦉, "
    "eagle 🦅, parrot 🦜, flamingo 🦩, peacock 🦚, swan 🦢, bee 🐝, butterfly 🦋, snail 🐌, ladybug 🐞, ant 🐜, "
    "spider 🕷, scorpion 🦂, turtle 🐢, snake 🐍, crocodile 🐊, dinosaur 🦕, octopus 🐙, lobster 🦞, crab 🦀, "
    "fish 🐟, dolphin 🐬, whale 🐳, shark 🦈",
    "food": "apple 🍎, pear 🍐, orange 🍊, lemon 🍋, banana 🍌, watermelon 🍉, strawberry 🍓, peach 🍑, "
    "pineapple 🍍, coconut 🥥, kiwi 🥝, tomato 🍅, eggplant 🍆, avocado 🥑, cucumber 🥒, carrot 🥕, peanut 🥜, "
    "croissant 🥐, pretzel 🥨, waffle 🧇, hamburger 🍔, pizza 🍕, hot dog 🌭, sandwich 🥪, taco 🌮, "
    "ice cream 🍦, donut 🍩, cookie 🍪, cake 🎂, cupcake 🧁, pie 🥧, lollipop 🍭, egg 🥚, mushroom 🍄, "
    "pumpkin 🎃",
    "vehicle": "car 🚗, bus 🚌, truck 🚚, tractor 🚜, fire truck 🚒, ambulance 🚑, motorcycle 🏍, bicycle 🚲, "
    "train 🚂, airplane ✈, helicopter 🚁, rocket 🚀, sailboat ⛵, ship 🚢, canoe 🛶",
    "plant": "tree 🌳, palm tree 🌴, cactus 🌵, sunflower 🌻, rose 🌹, tulip 🌷, clover 🍀",
    "piece of clothing": "hat 🎩, cap 🧢, crown 👑, dress 👗, shirt 👕, sock 🧦, boot 👢, shoe 👟, glove 🧤, "
    "scarf 🧣",
    "instrument": "guitar 🎸, violin 🎻, trumpet 🎺, drum 🥁, saxophone 🎷, accordion 🪗, piano 🎹, bell 🔔",
    "tool": "hammer 🔨, wrench 🔧, saw 🪚, axe 🪓, ladder 🪜, knife 🔪, magnet 🧲, pencil ✏, paintbrush 🖌, "
    "broom 🧹, bucket 🪣, anchor ⚓, microscope 🔬, telescope 🔭",
    "thing": "soccer ball ⚽, basketball 🏀, football 🏈, baseball ⚾, volleyball 🏐, ring 💍, backpack 🎒, "
    "handbag 👜, umbrella ☂, key 🔑, lock 🔒, clock ⏰, watch ⌚, chair 🪑, bed 🛏, couch 🛋, light bulb 💡, "
    "candle 🕯, flashlight 🔦, telephone ☎, phone 📱, camera 📷, television 📺, radio 📻, microphone 🎤, "
    "laptop 💻, book 📕, envelope ✉, gift 🎁, balloon 🎈, teddy bear 🧸, kite 🪁, die 🎲, bathtub 🛁, "
    "toilet 🚽, teapot 🫖, basket 🧺, door 🚪, window 🪟, globe 🌍, shopping cart 🛒, diamond 💎, trophy 🏆, "
    "medal 🏅, boxing glove 🥊, skateboard 🛹, house 🏠, castle 🏰, tent ⛺, Ferris wheel 🎡, sun ☀, moon 🌙, "
    "star ⭐, cloud ☁, rainbow 🌈, snowflake ❄, fire 🔥, snowman ⛄, heart ❤, robot 🤖, ghost 👻, skull 💀, "
    "alien 👽, bone 🦴, tooth 🦷, hand ✋",
}
KINDS = {kind: dict(thing.rsplit(" ", 1) for thing in things.split(", ")) for kind, things in KINDS.items()}
OBJECTS = {name: emoji for things in KINDS.values() for name, emoji in things.items()}
GROUNDS = {  # colours of the background
    "red": (204, 44, 44), "blue": (52, 96, 212), "green": (62, 158, 74), "yellow": (246, 212, 62),
    "white": (240, 240, 240), "black": (22, 22, 24), "gray": (132, 132, 134), "pink": (247, 160, 196),
    "purple": (128, 58, 172), "brown": (122, 76, 44),
}
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
IRREGULAR = {"mouse": "mice", "sheep": "sheep", "deer": "deer", "fish": "fish", "knife": "knives", "die": "dice",
             "scarf": "scarves", "snowman": "snowmen",
             "tooth": "teeth", "tomato": "tomatoes", "piece of clothing": "pieces of clothing"}


def a(name: str) -> str:
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def plural(name: str) -> str:
    if name in IRREGULAR:
        return IRREGULAR[name]
    if name.endswith("y") and name[-2] not in "aeiou":
        return name[:-1] + "ies"
    return name + ("es" if name.endswith(("s", "x", "ch", "sh")) else "s")


def number(count: int, name: str) -> str:
    return a(name) if count == 1 else f"{NUMBERS[count]} {plural(name)}"


def listing(names: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def things(names: list[str]) -> str:
    """["cat", "dog", "cat"] -> "two cats and a dog"."""
    return listing([number(count, name) for name, count in Counter(names).items()]) or "nothing"
