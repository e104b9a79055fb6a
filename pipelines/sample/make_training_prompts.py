"""Writes the prompts that the embedded DiffPO aligner is trained on, as one Parquet file.

    python pipelines/sample/make_training_prompts.py out/training-prompts.parquet

They were written for this project, as forms with what goes into them; none is in prompts.jsonl, the prompts of
`make align`, and no benchmark's prompts are among them. The same pyarrow writes the same bytes again.
"""

import argparse
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

CONCEPTS = """
gravity; photosynthesis; evaporation; friction; magnetism; static electricity; the water cycle; a food chain; plate
tectonics; erosion; the greenhouse effect; the ozone layer; a solar eclipse; the seasons; tides; a rainbow; lightning;
an earthquake; a volcano; a glacier; coral reefs; hibernation; migration; pollination; camouflage; evolution; natural
selection; DNA; a cell; the immune system; digestion; the heart; the liver; sleep; dreams; memory; stress; vitamins;
protein; calories; yeast; bacteria; antibiotics; allergies; supply and demand; a recession; a budget; a mortgage;
interest rates; insurance; a tax; a stock; a currency; globalisation; a monopoly; democracy; a constitution; a
referendum; a parliament; the rule of law; human rights; a treaty; the United Nations; a census; an algorithm; a
database; encryption; a password manager; the internet; a web browser; a search engine; cloud computing; spam; machine
learning; a spreadsheet; open source; a pixel; a battery; a transistor; a satellite; radar; GPS; a wind turbine; a
solar panel; a steam engine; a lever; a pulley; a fraction; a percentage; the average; probability; a prime number; an
angle; a metaphor; a haiku; a sonnet; irony; a synonym; a verb; perspective in painting; harmony in music; rhythm; an
orchestra
"""
TASKS = """
clean a cast-iron pan; boil an egg; cook rice; make pancakes; bake a potato; make vegetable soup; store fresh herbs;
sharpen a kitchen knife; remove a coffee stain; wash a wool jumper; iron a shirt; sew on a button; unblock a sink;
change a light bulb; bleed a radiator; paint a wall; hang a picture; fix a squeaky door; clean windows; descale a
kettle; defrost a freezer; repot a plant; grow tomatoes; start a compost heap; prune a rose; plant a tree; keep bees;
attract birds to a garden; get rid of slugs; care for a cactus; train a puppy; cut a cat's claws; clean an aquarium;
pack a suitcase; read a map; pitch a tent; light a campfire; tie a bow tie; change a tyre; check the oil in a car;
ride a bicycle in traffic; learn to swim; stretch before a run; start jogging; stay focused; take notes in a lecture;
prepare for an exam; give a speech; write a thank-you letter; apologise to a friend; ask for a raise; prepare for a
job interview; write a CV; run a meeting; make a to-do list; save money each month; compare phone contracts; back up
photos; choose a strong password; clean a keyboard; take a good portrait; draw a face; learn a song by heart; tune a
guitar; learn new vocabulary; practise a language every day; read more books; fall asleep faster; wake up earlier;
drink more water; eat more vegetables; plan a birthday party; organise a bookshelf; wrap a present; make paper
aeroplanes; teach a child to read a clock; introduce myself at a party; remember names; calm down before a test; deal
with a noisy neighbour; return a broken product; write a polite complaint; split a bill fairly; choose a pair of
running shoes; measure a room for a carpet; recycle glass
"""
PAIRS = """
a fruit and a vegetable; a frog and a toad; a crocodile and an alligator; a rabbit and a hare; a moth and a butterfly;
a planet and a star; a comet and an asteroid; a lake and a sea; a hill and a mountain; fog and smoke; rain and
drizzle; hail and snow; a river and a canal; a city and a town; a law and a rule; a fact and an opinion; a novel and a
short story; poetry and prose; a simile and a metaphor; a biography and an autobiography; a violin and a viola; a
piano and a harpsichord; jazz and blues; a painting and a drawing; a bank and a credit union; a loan and a grant; a
debit card and a credit card; gross and net income; revenue and profit; a company and a charity; a job and a career; a
leader and a manager; advice and instructions; empathy and sympathy; jealousy and envy; confidence and arrogance; a
cold and the flu; a sprain and a fracture; a dietitian and a doctor; fat and sugar; baking and roasting; baking soda
and baking powder; jam and marmalade; coffee and espresso; a herb and a spice; butter and margarine; a laptop and a
tablet; RAM and storage; hardware and software; a virus scanner and a firewall; a website and an app; analogue and
digital; speed and acceleration; mass and weight; heat and temperature; an atom and a molecule; an acid and a base; a
metal and an alloy; renewable and fossil energy; weather forecasts and climate models
"""
THEMES = """
the first day of spring; a lost umbrella; a train that never stops; an old oak tree; a lighthouse keeper; the last
slice of cake; a robot that wants to paint; a quiet library at night; a letter from the future; two snails in a race;
a village without clocks; a grandmother's recipe; a storm at sea; a child's first bicycle; the smell of rain; a dragon
who is afraid of heights; a night market; a forgotten key; a town on the moon; a garden in winter; a dog waiting at a
station; a broken piano; a walk along a river; a secret staircase; an honest thief; the sound of snow; a message in a
bottle; a baker at four in the morning; a fox in the city; a hundred paper boats
"""
FORMS = """
a short poem; a four-line rhyme; a story of five sentences; an opening paragraph of a story; a dialogue between two
people; a diary entry; a postcard; a title and a one-sentence summary of a film
"""
WANTED = """
a rainy afternoon with children; a healthy breakfast; a cheap holiday; a school science project; a birthday present
for a teacher; a team-building day; names for a bakery; names for a cat; a podcast about history; a small balcony
garden; a packed lunch; a date at home; a family walk; using up old bread; reducing plastic at home; saving
electricity; learning Spanish; staying active at a desk; a classroom game; a farewell speech; decorating a small room;
a picnic; a hobby that costs nothing; volunteering; a book club; a charity run; a thank-you note; a slogan for a
library; a mural in a school; meeting people in a new city
"""
SITUATIONS = """
I forgot my best friend's birthday; My flatmate never washes up; I have two job offers and cannot decide; I am nervous
about moving abroad; My phone fell into water; I spilled tea on my keyboard; My plant's leaves are turning yellow; I
keep waking up at three in the morning; My child refuses to eat vegetables; My neighbour plays loud music at night; I
was given too much change in a shop; I found a wallet in the street; My colleague takes credit for my work; I am late
for an important meeting; I disagree with my manager; I lost my motivation to study; My parents do not like my new
job; My bicycle was stolen; I broke something in a friend's house; My train was cancelled; I want to quit smoking; I
feel tired all day; I have to give a talk and I am shy; I want to learn to cook but have little time; My dog is afraid
of fireworks; My friend owes me money; I received a rude email; I want to spend less time on my phone; My internet is
very slow; I have to write an essay by tomorrow; I am new in a team and know nobody; I want to say no without being
rude; My baby brother broke my laptop; I burned dinner and guests arrive in an hour; I have a sore throat; I cannot
stop worrying about an exam; I would like to get fit but hate the gym; My shoes hurt; I want to be a better listener;
My friend is moving far away
"""
PLACES = """
Lisbon; Kyoto; Cairo; Nairobi; Lima; Vienna; Istanbul; Prague; Havana; Oslo; Venice; Athens; Marrakesh; Mumbai;
Singapore; Quebec; Edinburgh; Buenos Aires; Cape Town; Reykjavik; the Amazon; the Sahara; the Alps; the Nile; the
Great Barrier Reef; the Dead Sea; Mount Everest; the Grand Canyon; Antarctica; the Silk Road
"""
RISKS = """
eat raw eggs; swim right after a meal; charge a phone overnight; use a ladder alone; mix cleaning products; keep a
candle lit at night; eat snow; drink tap water when travelling; share a password with a friend; leave a dog in a
parked car; cycle without a helmet; look at the sun; use a hair dryer near a bath; reheat rice; take vitamins every
day; fast for a day; walk alone at night; click a link from an unknown sender; post holiday photos while away; climb a
tree; pet a stray cat; use an old electric blanket; pick wild mushrooms; run every day; sleep with contact lenses in;
skip breakfast; lend someone my bank card; use public Wi-Fi for banking; burn garden waste; fly a kite near power
lines
"""
SHAPES = {
    "explain": (
        CONCEPTS,
        [
            "Explain {} to a beginner in a few sentences.", "What is {}? Give one everyday example.",
            "Describe {} in simple words.",
        ],
    ),
    "howto": (TASKS, ["How do I {}?", "Give me three tips on how to {}."]),
    "compare": (PAIRS, ["What is the difference between {}?", "Compare {} in two sentences."]),
    "ideas": (WANTED, ["Give me five ideas for {}.", "I need a good idea for {}. What would you suggest, and why?"]),
    "advice": (SITUATIONS, ["{}. What should I do?"]),
    "places": (PLACES, ["What is {} known for?", "Tell me two interesting facts about {}."]),
    "safety": (RISKS, ["Is it safe to {}?"]),
}  # fmt: skip
"""By category: what goes into its forms, and these."""


def items(text: str) -> list[str]:
    return [" ".join(each.split()) for each in text.split(";")]


def prompts() -> pa.Table:
    """`id`, `category` and `prompt` (text) of every prompt."""
    rows = [
        (category, form.format(item))
        for category, (texts, forms) in SHAPES.items()
        for item in items(texts)
        for form in forms
    ]
    rows += [("writing", f"Write {form} about {theme}.") for theme in items(THEMES) for form in items(FORMS)]
    ids = [f"{category}-{number:04d}" for number, (category, _) in enumerate(rows)]
    return pa.table({"id": ids, "category": [row[0] for row in rows], "prompt": [row[1] for row in rows]})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="the Parquet file to write")
    path, made = parser.parse_args().path, prompts()
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(made, path, compression="zstd", row_group_size=64)
    print(f"{path}: {made.num_rows} prompts")


if __name__ == "__main__":
    main()
