"""The training text of the tiny example model, written for this repository.

Every document is a ``(prompt, completion)`` pair of short English strings.  A
completion always follows from its prompt: from a fact listed below, from a
simple rule (counting, adding, copying), or, in a story, from the four things
that its first sentence names.  A model that has learnt the text is therefore
sure of its next token nearly everywhere after the prompt, which makes
"do two implementations produce the same greedy tokens?" a fair question.

Licence of the text: Apache-2.0, like the rest of the repository.
"""

import random

# country, capital, continent, language, what a visitor sees there
COUNTRIES = [row.split("|") for row in """
France|Paris|Europe|French|wide rivers and old vineyards
Germany|Berlin|Europe|German|dark forests and tall castles
Italy|Rome|Europe|Italian|warm hills and stone bridges
Spain|Madrid|Europe|Spanish|dry plains and white villages
Portugal|Lisbon|Europe|Portuguese|steep streets and blue tiles
Greece|Athens|Europe|Greek|bright islands and old temples
Norway|Oslo|Europe|Norwegian|deep fjords and snowy peaks
Sweden|Stockholm|Europe|Swedish|quiet lakes and red cabins
Finland|Helsinki|Europe|Finnish|birch woods and warm saunas
Denmark|Copenhagen|Europe|Danish|flat fields and busy bicycles
Poland|Warsaw|Europe|Polish|green meadows and brick churches
Austria|Vienna|Europe|German|high mountains and music halls
Ireland|Dublin|Europe|English|green cliffs and soft rain
Hungary|Budapest|Europe|Hungarian|hot baths and long bridges
Japan|Tokyo|Asia|Japanese|quiet gardens and fast trains
China|Beijing|Asia|Chinese|long walls and crowded markets
Thailand|Bangkok|Asia|Thai|golden roofs and sandy beaches
Vietnam|Hanoi|Asia|Vietnamese|rice fields and misty bays
Turkey|Ankara|Asia|Turkish|round domes and spice shops
Iran|Tehran|Asia|Persian|rose gardens and wide deserts
Egypt|Cairo|Africa|Arabic|great pyramids and one long river
Morocco|Rabat|Africa|Arabic|narrow alleys and sandy dunes
Kenya|Nairobi|Africa|Swahili|grassy plains and tall giraffes
Ghana|Accra|Africa|English|warm coasts and cocoa farms
Brazil|Brasilia|South America|Portuguese|huge forests and loud carnivals
Peru|Lima|South America|Spanish|high paths and woolly llamas
Chile|Santiago|South America|Spanish|dry deserts and icy glaciers
Cuba|Havana|North America|Spanish|old cars and sugar fields
Mexico|Mexico City|North America|Spanish|stepped temples and hot chillies
Canada|Ottawa|North America|English|maple woods and frozen lakes
""".strip().splitlines()]

# animal, sound, young, legs, colour, food
ANIMALS = [row.split("|") for row in """
dog|barks|puppy|four|brown|meat
cat|meows|kitten|four|black|fish
cow|moos|calf|four|white|grass
horse|neighs|foal|four|brown|hay
sheep|bleats|lamb|four|white|grass
pig|grunts|piglet|four|pink|roots
duck|quacks|duckling|two|green|weeds
hen|clucks|chick|two|red|grain
lion|roars|cub|four|golden|meat
frog|croaks|tadpole|four|green|flies
owl|hoots|owlet|two|grey|mice
goose|honks|gosling|two|white|grass
""".strip().splitlines()]

OPPOSITES = [pair.split("/") for pair in (
    "hot/cold big/small fast/slow high/low open/closed wet/dry light/dark "
    "old/new hard/soft early/late happy/sad full/empty strong/weak near/far "
    "left/right clean/dirty loud/quiet thick/thin rich/poor day/night").split()]

FACTS = [row.split("|") for row in """
What colour is the sky on a clear day?|Blue.
What colour is grass?|Green.
What colour is snow?|White.
What colour is a ripe banana?|Yellow.
What colour is a ripe tomato?|Red.
How many days are in a week?|Seven.
How many months are in a year?|Twelve.
How many hours are in a day?|Twenty-four.
How many minutes are in an hour?|Sixty.
How many sides does a triangle have?|Three.
How many sides does a square have?|Four.
How many legs does a spider have?|Eight.
How many legs does an insect have?|Six.
How many wheels does a bicycle have?|Two.
What is frozen water called?|Ice.
What do bees make?|Honey.
What do we breathe?|Air.
What shines at night?|The moon.
What planet do we live on?|Earth.
What is the largest planet?|Jupiter.
What is the closest star to us?|The sun.
Which season comes after winter?|Spring.
Which season comes after summer?|Autumn.
Which ocean is the largest?|The Pacific.
What do we use to cut paper?|Scissors.
What do we use to write on a board?|Chalk.
Where do fish live?|In water.
Where do birds sleep?|In nests.
Who flies an aeroplane?|A pilot.
Who bakes bread?|A baker.
Who teaches children at school?|A teacher.
Who mends broken teeth?|A dentist.
""".strip().splitlines()]

NUMBER_WORDS = ("one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
                "fifteen sixteen seventeen eighteen nineteen twenty").split()

SEQUENCES = [
    ("Name the days of the week:", "Monday Tuesday Wednesday Thursday Friday Saturday Sunday"),
    ("Name the months of the year:", "January February March April May June July August September "
                                     "October November December"),
    ("Name the seasons:", "spring summer autumn winter"),
    ("Name the planets:", "Mercury Venus Earth Mars Jupiter Saturn Uranus Neptune"),
    ("Name the colours of the rainbow:", "red orange yellow green blue indigo violet"),
    ("Say the alphabet:", "A B C D E F G H I J K L M N O P Q R S T U V W X Y Z"),
]

NAMES = {"Mia": "she", "Anna": "she", "Lucy": "she", "Rosa": "she", "Ella": "she", "Nora": "she",
         "Tom": "he", "Ben": "he", "Max": "he", "Leo": "he", "Sam": "he", "Otto": "he"}

# hero: (temper, friend, what the friend says)
HEROES = {
    "fox": ("clever", "the old badger", "Think first and run later"),
    "bear": ("strong but slow", "the tiny wren", "Lift it gently"),
    "rabbit": ("quick and shy", "the patient tortoise", "There is no need to hurry"),
    "mouse": ("small and brave", "the grey owl", "I will watch from above"),
    "otter": ("playful", "the busy beaver", "Work comes before games"),
    "goat": ("stubborn", "the wise donkey", "Try another way"),
    "crow": ("curious", "the red squirrel", "Look but do not peck"),
    "hedgehog": ("careful", "the green frog", "Jump when I jump"),
}

# object: (wish, discovery, lesson)
TREASURES = {
    "a lantern": ("light the dark path", "the lamp had no oil, so they filled it with fat from a nut",
                  "A little light is enough for two"),
    "a silver key": ("open a secret door", "the key fitted a small green gate behind the ivy",
                     "Every key has a lock somewhere"),
    "a wooden boat": ("sail to the far shore", "the boat had a hole, so they closed it with wax",
                      "A mended boat still floats"),
    "a brass bell": ("call all the neighbours", "the bell was full of mud, so they washed it twice",
                     "A clean bell rings far"),
    "an old map": ("see the end of the world", "the map was upside down, and the end was home",
                   "The best journeys lead back"),
    "a red kite": ("touch the clouds", "the string was short, so they tied on a long vine",
                   "Good knots make high kites"),
    "a bag of seeds": ("grow a great garden", "the seeds were dry, so they carried water all day",
                       "Gardens begin with wet feet"),
    "a glass marble": ("hold a tiny moon", "the marble showed a rainbow when the sun came out",
                       "Small things can hold big colours"),
}

# place: (what happens there, the way home)
PLACES = {
    "in the forest": ("the wind shook the leaves", "under the tall trees"),
    "by the river": ("the water rose to the stones", "along the muddy bank"),
    "on the hill": ("a cloud covered the sun", "down the grassy slope"),
    "near the village": ("the clock struck five", "past the sleepy houses"),
    "at the beach": ("a wave rolled over the sand", "between the warm dunes"),
    "in the garden": ("a bee flew around the roses", "through the little gate"),
}

THINGS = "apple ball book coin cup drum feather flag hat key lamp pear pen plum ring rope shell stone".split()
COLOURS = "red green blue white black yellow".split()


def question(text, answer):
    """A question document."""
    return f"Question: {text} Answer:", f" {answer}"


def article(noun):
    """``noun`` with "a" or "an" before it."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def fact_documents():
    """All question/answer pairs and short descriptions whose content is a listed fact."""
    docs = [question(text, answer) for text, answer in FACTS]
    for country, capital, continent, language, sights in COUNTRIES:
        docs += [
            question(f"What is the capital of {country}?", f"{capital}."),
            question(f"Which country has the capital {capital}?", f"{country}."),
            question(f"Where is {country}?", f"In {continent}."),
            question(f"What language do people speak in {country}?", f"{language}."),
            (f"Tell me about {country}.",
             f" {country} is a country in {continent}. The capital of {country} is {capital}. Most people there "
             f"speak {language}. A visitor to {country} will see {sights}."),
        ]
    for animal, sound, young, legs, colour, food in ANIMALS:
        docs += [
            question(f"What sound does a {animal} make?", f"It {sound}."),
            question(f"What is a young {animal} called?", f"A {young}."),
            question(f"How many legs does a {animal} have?", f"{legs.capitalize()}."),
            question(f"What does a {animal} eat?", f"{food.capitalize()}."),
            (f"Tell me about the {animal}.",
             f" The {animal} has {legs} legs. This {animal} is {colour} and eats {food}. When it is awake, "
             f"the {animal} {sound}. A young {animal} is called a {young}."),
        ]
    for one, other in OPPOSITES:
        docs += [question(f"What is the opposite of {one}?", f"{other.capitalize()}."),
                 question(f"What is the opposite of {other}?", f"{one.capitalize()}.")]
    for prompt, words in SEQUENCES:
        docs.append((prompt, " " + ", ".join(words.split()) + "."))
    return docs


def sum_documents():
    """All sums of two numbers up to ten."""
    return [question(f"What is {a} plus {b}?", f"{a + b}.") for a in range(11) for b in range(11)]


def counting_document(rng):
    """Counting up to the next of 50 and 100, up to twenty in words, or down to 1."""
    kind = rng.random()
    if kind < 0.2:
        words = NUMBER_WORDS[rng.randrange(0, 18):]
        return f"Count from {words[0]} to twenty:", " " + ", ".join(words) + "."
    if kind < 0.4:
        first = rng.randrange(3, 51)
        return f"Count down from {first} to 1:", " " + ", ".join(str(n) for n in range(first, 0, -1)) + "."
    first = rng.choice([n for n in range(1, 99) if n not in (49, 50)])
    last = 50 if first < 50 else 100
    return f"Count from {first} to {last}:", " " + ", ".join(str(n) for n in range(first, last + 1)) + "."


def copying_document(rng):
    """A list of things to be said again: the answer stands in the prompt."""
    listed = " ".join(rng.sample(THINGS, rng.randrange(4, 15)))
    return f"List: {listed}. Again:", f" {listed}."


def owning_document(rng):
    """Three or four owners and a question about one of them."""
    names = rng.sample(sorted(NAMES), rng.randrange(3, 5))
    owned = [f"{article(rng.choice(COLOURS))} {thing}" for thing in rng.sample(THINGS, len(names))]
    said = " ".join(f"{name} has {thing}." for name, thing in zip(names, owned))
    asked = rng.randrange(len(names))
    prompt, answer = question(f"What does {names[asked]} have?", f"{owned[asked].capitalize()}.")
    return f"{said} {prompt}", answer


def story(name, hero, treasure, place):
    """The story that belongs to these four; its first sentence is the prompt."""
    he = NAMES[name]
    temper, friend, advice = HEROES[hero]
    wish, discovery, lesson = TREASURES[treasure]
    event, way_home = PLACES[place]
    return (
        f"Story: {name} the {hero} found {treasure} {place}.",
        f" {name} was {temper}, and {he} wanted to {wish}. So {name} went to {friend} for help. \"{advice},\" said "
        f"{friend}. They worked together until {event}. Then they saw that {discovery}. {name} laughed and "
        f"thanked {friend}. \"{lesson},\" said {name}. In the evening {he} walked home {way_home} and slept well. "
        f"The end.")


def story_document(rng):
    """A story about a random hero, treasure and place."""
    return story(*(rng.choice(sorted(table)) for table in (NAMES, HEROES, TREASURES, PLACES)))


class Corpus:
    """An endless, seeded stream of documents."""

    def __init__(self, seed=0):
        self.rng = random.Random(seed)
        self.facts = fact_documents()
        self.sums = sum_documents()

    def document(self):
        """The next ``(prompt, completion)`` pair."""
        kind = self.rng.random()
        if kind < 0.36:
            return self.rng.choice(self.facts)
        if kind < 0.48:
            return self.rng.choice(self.sums)
        if kind < 0.55:
            return counting_document(self.rng)
        if kind < 0.77:
            return copying_document(self.rng)
        if kind < 0.91:
            return owning_document(self.rng)
        return story_document(self.rng)


if __name__ == "__main__":
    corpus = Corpus()
    for _ in range(20):
        print("".join(corpus.document()))
