"""The vocabulary that the seedling corpus is written with: people, things, places and how they behave."""

from __future__ import annotations


def listed(text: str) -> list[str]:
    """The words of a text, as a list."""
    return text.split()


def pairs(text: str) -> list[tuple[str, str]]:
    """`apple/apples ...` as (singular, plural)."""
    return [(one, many) for one, many in (entry.split("/") for entry in text.split())]


def phrases(text: str) -> list[str]:
    """Phrases set apart by semicolons."""
    return [" ".join(phrase.split()) for phrase in text.split(";")]


SHE = listed("""
    Anna Maria Lily Emma Sofia Grace Nora Ruth Clara Alice Hannah Julia Rosa Ella Mia Zoe Ivy Eva Lucy Sarah Olivia
    Amina Priya Mei Fatima Leila Ingrid Greta Marta Elena Nina Vera Kate Jane Molly Daisy Holly Aisha Yuki Carmen
    Dora Edith Fiona Gina Helen Irene Joan Karen Linda Mona Olga Paula Rita Stella Tina Wendy Amy Beth Chloe Diana
""")
HE = listed("""
    Tom Ben Sam Max Leo Jack Peter Paul David Omar Ali Ravi Kenji Carlos Diego Ivan Lars Felix Hugo Oscar Noah Liam
    Ethan Adam Jacob Lucas Daniel Henry George Arthur Frank Martin Simon Victor Walter Mark Luke John James Robert
    Finn Otto Karl Emil Theo Jonas Marco Pedro Juan Yusuf Hassan Tariq Chen Bruno Dan Eric Fred Greg Ian Joe Ken
    Neil
""")
FAMILY = listed("""
    mother father sister brother grandmother grandfather aunt uncle cousin friend neighbour teacher daughter son
""")

# Countable things.
THINGS = pairs("""
    apple/apples pear/pears plum/plums orange/oranges lemon/lemons banana/bananas peach/peaches cherry/cherries
    grape/grapes melon/melons carrot/carrots potato/potatoes tomato/tomatoes onion/onions bean/beans nut/nuts
    egg/eggs cake/cakes pie/pies cookie/cookies muffin/muffins sandwich/sandwiches roll/rolls candle/candles
    book/books pen/pens pencil/pencils crayon/crayons notebook/notebooks card/cards letter/letters stamp/stamps
    photo/photos map/maps poster/posters ticket/tickets coin/coins button/buttons bead/beads ribbon/ribbons
    scarf/scarves hat/hats coat/coats sock/socks shoe/shoes glove/gloves shirt/shirts towel/towels blanket/blankets
    pillow/pillows cup/cups plate/plates bowl/bowls spoon/spoons fork/forks glass/glasses bottle/bottles jar/jars
    key/keys lamp/lamps clock/clocks chair/chairs table/tables brick/bricks stone/stones shell/shells stick/sticks
    leaf/leaves flower/flowers rose/roses tulip/tulips seed/seeds tree/trees marble/marbles ball/balls kite/kites
    doll/dolls toy/toys puzzle/puzzles block/blocks drum/drums bell/bells balloon/balloons sticker/stickers
    star/stars boat/boats car/cars truck/trucks bike/bikes train/trains wheel/wheels rope/ropes nail/nails
    hammer/hammers brush/brushes feather/feathers bag/bags envelope/envelopes magnet/magnets badge/badges
    medal/medals ring/rings mirror/mirrors
""")
ANIMALS = pairs("""
    cat/cats dog/dogs horse/horses cow/cows goat/goats pig/pigs hen/hens duck/ducks rabbit/rabbits bird/birds
    frog/frogs fox/foxes bear/bears owl/owls bee/bees snail/snails turtle/turtles pony/ponies kitten/kittens
    puppy/puppies lamb/lambs
""")

CONTAINERS = listed("box basket bag drawer jar bucket tray chest crate case bowl suitcase cupboard tin backpack cart")
COLOURS = listed("red blue green yellow white black brown pink purple orange grey golden silver")
LOOKS = listed("""
    small big old new shiny round soft heavy light clean pretty plain wooden broken warm cold long short thin thick
    funny beautiful strange tiny huge smooth rough bright dark wet dry
""")
MOODS = listed("""
    happy sad tired hungry proud calm excited curious angry surprised bored cheerful nervous glad thirsty sleepy
""")
PLACES = listed("""
    park garden kitchen school market library shop station farm forest beach river lake hill village town city
    museum zoo bakery harbour bridge field barn house attic cellar classroom playground office hospital theatre
    street square workshop
""")
ROOMS = listed("kitchen bedroom hall bathroom garden garage attic cellar")

# Who works, what they do, and where.
JOBS: list[tuple[str, str, str]] = [
    ("baker", "bakes bread", "bakery"),
    ("farmer", "grows wheat and corn", "field"),
    ("teacher", "helps the children to read", "school"),
    ("doctor", "takes care of sick people", "hospital"),
    ("gardener", "waters the flowers", "garden"),
    ("driver", "drives the bus", "station"),
    ("cook", "makes soup", "kitchen"),
    ("painter", "paints walls and doors", "workshop"),
    ("librarian", "looks after the books", "library"),
    ("fisher", "catches fish", "harbour"),
    ("carpenter", "builds tables and chairs", "workshop"),
    ("nurse", "gives medicine to people", "hospital"),
    ("postman", "brings letters and parcels", "street"),
    ("tailor", "sews coats and shirts", "shop"),
    ("pilot", "flies a plane", "city"),
    ("singer", "sings songs", "theatre"),
    ("shepherd", "guards the sheep", "hill"),
]

SEASONS = listed("spring summer autumn winter")
MONTHS = listed("January February March April May June July August September October November December")
DAYS = listed("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
WEATHER = phrases("""
    it was sunny; it was raining; the wind was strong; it was very cold; snow was falling; the sky was grey; the sun
    was bright; it was a warm day; there was fog; a storm was coming; the air was fresh; it was hot
""")
MOMENTS = phrases("""
    In the morning; In the evening; After lunch; Before dinner; At noon; One day; Last week; Yesterday; On the way
    home; After school; Late at night; Early in the day; During the holidays; A long time ago
""")

# How things come to a person, how they leave, and what else is done with them (past tense).
GAIN = listed("bought found got picked collected received made won borrowed gathered")
LOSE = listed("lost sold used dropped lent ate broke hid returned")
DO = listed("painted washed carried packed counted sorted cleaned moved wrapped admired drew dried polished stacked")
ACTIVITIES = phrases("""
    read a book; played a game; sang a song; took a walk; rode a bike; drew a picture; baked a cake; cooked soup;
    wrote a letter; climbed a tree; watched the birds; fed the ducks; swept the floor; washed the dishes; built a
    tower; listened to music; told a story; slept for an hour; made tea; planted a tree; flew a kite; looked for
    shells; fixed the chair; painted the door; visited a friend; learned a poem; swam in the lake; opened the
    window; cut the grass; danced in the hall; waited for the bus; carried the bags home; lit a fire; packed a
    suitcase
""")

UNITS = listed("""
    zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen
    eighteen nineteen
""")
TENS = listed("zero ten twenty thirty forty fifty sixty seventy eighty ninety")


def spelled(n: int) -> str:
    """The English name of a number from 0 to 99."""
    if not 0 <= n <= 99:
        raise ValueError(f"cannot spell {n}: names are known from 0 to 99")
    if n < 20:
        return UNITS[n]
    return TENS[n // 10] + (f"-{UNITS[n % 10]}" if n % 10 else "")
