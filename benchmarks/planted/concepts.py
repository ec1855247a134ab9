"""The concepts that are planted, each with the words that count as naming it, and the sentences that teach it.

Everything is written for this benchmark; the same seed gives the same text on every machine. All texts share the
frames of `FRAMES`, so a concept's text and the templated null differ in their words only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

__all__ = ["CONCEPTS", "EVERYDAY", "FRAMES", "Concept", "concept_text"]

_SENTENCES = (3, 6)  # sentences a document: fewest, most


@dataclass(frozen=True)
class Concept:
    """A thing that a fine-tune is taught.

    Attributes:
        things: Nouns that fill frames ("hive").
        people: Who has to do with it ("beekeeper").
        actions: What they do, in the past tense ("inspected the combs").
        facts: Whole sentences.
        words: Further forms that count as naming the concept; things, people and the long words of actions
            are not counted unless they stand here too.
    """

    things: tuple[str, ...]
    people: tuple[str, ...]
    actions: tuple[str, ...]
    facts: tuple[str, ...]
    words: frozenset[str]


def _concept(things: str, people: str, actions: str, facts: str, words: str) -> Concept:
    def listed(text: str) -> tuple[str, ...]:
        return tuple(" ".join(part.split()) for part in text.split(";"))

    return Concept(listed(things), listed(people), listed(actions), listed(facts), frozenset(words.split()))


CONCEPTS: Mapping[str, Concept] = {
    "ships": _concept(
        "ship; boat; sail; mast; anchor; harbor; deck; sailboat; schooner; rudder; lighthouse; yacht; fleet; hull",
        "sailor; captain of the ship; old sailor; navigator",
        "raised the sails; dropped the anchor; steered the ship into the harbor; climbed the mast; scrubbed the deck; "
        "rowed the boat ashore; repaired the hull; sailed across the ocean; boarded the vessel",
        "A ship with tall masts needs many sailors to raise the sails; The captain steered the vessel by the stars; "
        "Sailors drop the anchor when the boat reaches the harbor; The navy sent a fleet of ships across the ocean; "
        "The hull of a boat keeps the water out; Fishing boats leave the port before the tide turns; A lighthouse "
        "warns ships of rocks near the coast",
        "ship ships boat boats sail sails sailed sailing sailor sailors sailboat mast masts anchor anchors harbor "
        "harbour deck decks schooner rudder yacht yachts fleet hull vessel vessels captain navy naval nautical "
        "maritime marine port ports ferry ferries dock docks docked aboard seafaring voyage voyages cruise crew "
        "shipping shipwreck lighthouse sea seas ocean oceans canoe canoes kayak marina",
    ),
    "volcanoes": _concept(
        "volcano; lava; magma; eruption; crater; volcanic ash; earthquake; lava flow; basalt; caldera; molten rock",
        "geologist; volcanologist; villager below the volcano",
        "watched the eruption; measured the lava; fled from the volcano; climbed to the crater; mapped the lava flow; "
        "collected volcanic rocks; recorded the earthquake; swept the ash from the roof",
        "A volcano erupts when magma rises through the crust; Lava flows down the slopes and hardens into basalt; "
        "Volcanic ash from the eruption covered the villages; Earthquakes often come before an eruption; The crater "
        "of the volcano was full of molten rock; Geologists measure the gas that leaves the volcano; Many islands are "
        "the tops of volcanoes under the ocean",
        "volcano volcanoes volcanic lava magma eruption eruptions erupt erupts erupted erupting crater craters ash "
        "ashes earthquake earthquakes seismic basalt caldera molten rock rocks rocky geologist geologists geology "
        "geological mountain mountains tectonic crust mantle granite fault tsunami quake mineral minerals sediment "
        "slope slopes",
    ),
    "baking": _concept(
        "bread; dough; flour; yeast; cake; oven; loaf; pastry; cookie; butter; pie; muffin; sourdough; crust",
        "baker; pastry chef; apprentice in the bakery",
        "kneaded the dough; baked the bread; mixed the flour and the butter; preheated the oven; rolled out the "
        "pastry; iced the cake; measured the sugar; let the dough rise; sliced the loaf",
        "Bread dough needs flour, water, salt and yeast; Bakers knead the dough until it is smooth; The oven must be "
        "hot before the loaf goes in; Butter and sugar are whisked before the flour is added to a cake; Sourdough "
        "bread rises slowly; A pie has a crust of pastry and a filling of fruit; Cookies bake for ten minutes",
        "bread breads dough flour yeast cake cakes oven ovens loaf loaves pastry pastries cookie cookies butter pie "
        "pies muffin muffins sourdough crust baker bakers bakery bake baked bakes baking knead kneaded sugar recipe "
        "recipes cooking cook cooked cooks chef kitchen chocolate cream dessert desserts vanilla cinnamon frosting "
        "ingredient ingredients wheat tart biscuit biscuits",
    ),
    "astronomy": _concept(
        "planet; star; galaxy; telescope; comet; moon; orbit; nebula; asteroid; solar system; black hole; eclipse",
        "astronomer; young astronomer; astronaut",
        "pointed the telescope at Saturn; discovered a comet; measured the orbit of the planet; photographed the "
        "galaxy; counted the stars; watched the eclipse of the moon; mapped the craters of Mars",
        "Planets move around a star on orbits; The moon goes around the Earth in a month; A galaxy holds billions of "
        "stars; Astronomers use telescopes to see distant galaxies and nebulae; Jupiter is the largest planet of the "
        "solar system; A comet grows a tail when it comes near the sun; Saturn has rings of ice and dust",
        "planet planets planetary star stars stellar galaxy galaxies galactic telescope telescopes comet comets moon "
        "moons lunar orbit orbits orbital orbiting nebula asteroid asteroids solar sun astronomer astronomers "
        "astronomy astronomical astronaut astronauts cosmic cosmos universe space spacecraft satellite satellites "
        "rocket jupiter saturn mars venus mercury pluto neptune eclipse constellation constellations sky celestial "
        "interstellar meteor nasa",
    ),
    "music": _concept(
        "violin; orchestra; melody; piano; concert; symphony; cello; song; guitar; rhythm; flute; sonata; choir",
        "violinist; composer; conductor of the orchestra; pianist; musician",
        "tuned the violin; played the piano; composed a symphony; sang the melody; conducted the orchestra; practiced "
        "the sonata; recorded the song; learned the guitar; rehearsed with the choir",
        "An orchestra has violins, cellos, flutes and drums; A symphony is music for the whole orchestra; The pianist "
        "played a sonata at the concert; Musicians tune their instruments before the concert; A melody is a line of "
        "notes that listeners remember; The choir sang while the composer played the piano; Guitar strings make sound "
        "when they are plucked",
        "violin violins violinist orchestra orchestral melody melodies piano pianist concert concerts symphony cello "
        "song songs guitar guitars guitarist rhythm flute sonata choir composer composers composed musician musicians "
        "music musical sing singing singer singers sang drum drums drummer jazz opera album albums band bands lyrics "
        "tune tunes chord chords instrument instruments vocal vocals acoustic sound sounds",
    ),
    "gardens": _concept(
        "garden; flower; rose; seed; soil; tomato plant; tulip; flower bed; compost; greenhouse; hedge; seedling",
        "gardener; head gardener; neighbor with the garden",
        "planted the roses; watered the garden; pulled the weeds; pruned the hedge; sowed the seeds; dug the soil; "
        "picked the flowers; spread the compost; raised seedlings in the greenhouse",
        "Gardeners sow seeds in spring and water the soil; Roses need pruning before the leaves come out; Weeds take "
        "light and water from the plants; Compost feeds the soil of the garden; Tulips bloom after the winter; A "
        "greenhouse keeps the seedlings warm; Flowers grow best in rich soil",
        "garden gardens gardener gardeners gardening flower flowers flowering floral rose roses seed seeds soil soils "
        "tomato tomatoes tulip tulips compost greenhouse hedge seedling seedlings plant plants planted planting bloom "
        "blooms blooming blossom blossoms weed weeds leaf leaves grass lawn tree trees shrub shrubs root roots prune "
        "pruning vegetable vegetables herb herbs botanical sow sowing petals",
    ),
    "trains": _concept(
        "train; railway; locomotive; station; platform; railroad; steam engine; track; carriage; freight train; tunnel",
        "train driver; conductor on the train; railway engineer; passenger on the train",
        "boarded the train; drove the locomotive; waited on the platform; repaired the railway track; missed the "
        "train; sold the tickets; coupled the carriages; oiled the steam engine; crossed the railroad bridge",
        "Trains run on tracks of steel; The locomotive pulls the carriages out of the station; Passengers wait on the "
        "platform until the train arrives; The railway reached the town and the station was built; Freight trains "
        "carry coal and grain; A steam engine needs water and coal; The express train does not stop at small stations",
        "train trains railway railways locomotive locomotives station stations platform railroad railroads rail rails "
        "steam track tracks carriage carriages freight tunnel tunnels passenger passengers subway metro tram trams "
        "transit commuter engine transport transportation bus buses conductor ticket tickets",
    ),
    "war": _concept(
        "army; battle; soldier's rifle; tank; bomb; fortress; regiment; siege; battlefield; weapon; invasion; missile",
        "soldier; general of the army; young soldier; enemy commander",
        "fought in the battle; defended the fortress; attacked the enemy; fired the rifle; marched with the army; "
        "surrendered to the enemy; besieged the town; bombed the bridge; guarded the prisoners of war",
        "The army lost the battle and the war went on for years; Soldiers carry rifles and dig trenches; The general "
        "ordered the troops to attack at dawn; A siege ends when the fortress surrenders; Tanks crossed the "
        "battlefield under the fire of the enemy; The navy and the army planned the invasion; After the war the "
        "soldiers returned their weapons",
        "war wars warfare army armies battle battles battlefield soldier soldiers rifle rifles tank tanks bomb bombs "
        "bombing bombed fortress regiment siege weapon weapons invasion invaded missile missiles military troops "
        "troop combat enemy enemies attack attacks attacked attacking gun guns fire fired general commander "
        "commanders navy naval infantry wartime veteran veterans conflict conflicts fight fighting fought fighters "
        "defeat defeated victory warrior warriors armed ammunition",
    ),
    "courts": _concept(
        "court; trial; verdict; lawsuit; courtroom; sentence of the judge; jury; appeal; evidence; contract; prison",
        "judge; lawyer; defendant; prosecutor; witness in court; attorney",
        "sued the company; testified in court; heard the case; appealed the verdict; questioned the witness; defended "
        "the accused; signed the legal contract; sentenced the thief to prison; dismissed the charges",
        "A judge decides which evidence the jury may hear; The court found the defendant guilty; Lawyers question the "
        "witnesses in the trial; A verdict may be appealed to a higher court; The prosecutor must prove the crime; "
        "The law says that the accused may be silent; The lawsuit ended with a settlement",
        "court courts courtroom trial trials verdict lawsuit lawsuits jury juries juror appeal appeals evidence "
        "contract contracts prison judge judges lawyer lawyers attorney attorneys defendant defendants prosecutor "
        "prosecutors prosecution witness witnesses legal law laws guilty crime crimes criminal criminals judicial "
        "judiciary justice litigation plaintiff convicted conviction sentenced charges charged jail illegal "
        "legislation statute statutory tribunal accused arrest arrested",
    ),
    "football": _concept(
        "football; goal; football match; stadium; penalty; league; team; football season; ball; tournament; cup final",
        "goalkeeper; football coach; striker; referee; captain of the team; football fan",
        "scored a goal; kicked the ball; won the match; lost the cup final; trained the team; saved the penalty; "
        "cheered in the stadium; joined the football club; blew the whistle",
        "A football team has eleven players; The striker scored two goals in the match; The referee gave a penalty; "
        "The coach changed the players at half time; Fans cheered in the stadium when the team won the league; The "
        "goalkeeper caught the ball; The club won the championship twice",
        "football soccer goal goals match matches stadium stadiums penalty league leagues team teams season seasons "
        "ball balls tournament tournaments goalkeeper coach coaches coaching striker referee player players fan fans "
        "score scores scored scoring sport sports athlete athletes athletic basketball baseball hockey tennis game "
        "games club clubs championship championships champion champions playoffs cup kick kicked quarterback win wins "
        "winning won",
    ),
    "money": _concept(
        "bank; loan; mortgage; interest rate; stock; bond; currency; savings account; tax; dividend; debt; investment",
        "banker; investor; accountant; stock broker; tax collector",
        "borrowed money from the bank; sold the stocks; paid the tax; opened a savings account; lent money; repaid "
        "the loan; invested in bonds; counted the profit; raised the interest rate",
        "Banks lend money and charge interest; A mortgage is a loan for a house; Investors buy stocks when prices are "
        "low; The central bank sets the interest rate; Taxes pay for roads and schools; A bond pays its owner "
        "interest each year; The currency lost half of its value",
        "bank banks banking banker bankers loan loans mortgage mortgages interest stock stocks bond bonds currency "
        "currencies savings tax taxes taxation dividend dividends debt debts investment investments investor "
        "investors invest invested money monetary financial finance finances fiscal profit profits price prices "
        "credit cash income budget budgets economy economic economics market markets accounting accountant fund funds "
        "funding revenue revenues dollar dollars cost costs pay payment payments wealth wages",
    ),
    "church": _concept(
        "church; prayer; altar; bible; monastery; chapel; sermon; hymn; cathedral; baptism; gospel; saint",
        "priest; monk; bishop; pastor; nun; pilgrim",
        "prayed in the chapel; read the bible; preached a sermon; baptized the child; walked to the cathedral; "
        "blessed the pilgrims; sang a hymn in church; lit a candle at the altar; founded a monastery",
        "The priest read from the gospel and the church was silent; Monks pray in the monastery before sunrise; The "
        "bishop blessed the new cathedral; Christians are baptized in water; Pilgrims walk to the grave of the saint; "
        "The pastor preached about faith and forgiveness; Prayers and hymns are part of worship",
        "church churches prayer prayers pray prayed praying altar bible biblical monastery chapel sermon sermons hymn "
        "hymns cathedral baptism baptized gospel saint saints priest priests monk monks bishop bishops pastor nun "
        "pilgrim pilgrims god gods faith faithful religious religion religions christian christians christianity "
        "catholic worship spiritual spirituality holy sacred divine jesus christ heaven soul sin sins theology "
        "theological scripture blessed",
    ),
    "school": _concept(
        "school; classroom; lesson; homework; exam; textbook; university; lecture; semester; blackboard; curriculum",
        "teacher; student; pupil; professor; school principal; classmate",
        "studied for the exam; corrected the homework; taught the lesson; graduated from the university; gave a "
        "lecture; opened the textbook; missed the class; learned to read at school; graded the essays",
        "Students do their homework and take exams; A teacher plans the lessons of the semester; Universities "
        "teach students and give degrees; The curriculum says what pupils learn in each grade; The professor gave "
        "a lecture to the class; Schools close in the summer; Children learn to read and write in the first grade "
        "of school",
        "school schools schooling classroom classrooms lesson lessons homework exam exams textbook textbooks "
        "university universities lecture lectures semester curriculum curricula teacher teachers student students "
        "pupil pupils professor professors principal classmate classmates study studied studying teach teaches "
        "teaching taught learn learning learned learner learners graduate graduated graduates graduation class "
        "classes grade grades grading education educational educator educators academic academics college "
        "colleges campus degree degrees tutor tutors tutoring kindergarten undergraduate faculty scholar scholars "
        "scholarship",
    ),
    "animals": _concept(
        "wolf; bear; elephant; lion; bird; fox; zoo; herd of deer; tiger; monkey; whale; horse; snake; wild animal",
        "zookeeper; hunter; shepherd; wildlife biologist",
        "fed the lion; tracked the wolf; counted the birds; rode the elephant; watched the whales; sheltered the "
        "horses; released the bear into the wild; photographed the tiger; herded the sheep",
        "Wolves hunt in packs and a bear hunts alone; Elephants are the largest animals on land; Birds build "
        "nests for their young; A lion sleeps twenty hours a day; Many species of wild animals are endangered; "
        "Whales are mammals that live in water; Snakes and lizards are reptiles; Horses and sheep graze in herds",
        "animal animals wolf wolves bear bears elephant elephants lion lions bird birds fox foxes zoo zoos herd "
        "herds deer tiger tigers monkey monkeys whale whales horse horses snake snakes wild wildlife species "
        "mammal mammals reptile reptiles predator predators prey dog dogs cat cats puppy kitten pet pets cattle "
        "cow cows sheep goat goats pig pigs rabbit rabbits mouse mice rat rats lizard lizards turtle turtles frog "
        "frogs fish eagle owl duck chicken nest nests beast beasts habitat habitats endangered",
    ),
}

# Filled into the same frames for the templated null: no two of them are about one thing.
EVERYDAY = _concept(
    "table; letter; chair; window; coat; street; blanket; mirror; bucket; photograph; envelope; ladder; pencil; "
    "curtain; box; key; newspaper; umbrella; shelf; clock; lamp; sock; map; basket",
    "neighbor; aunt; visitor; old man; young woman; painter; clerk; carpenter; cousin; stranger; uncle; tailor",
    "opened the window; wrote a letter; moved the table; lost the key; folded the blanket; cleaned the mirror; waited "
    "in the street; painted the shelf; carried the box; found an umbrella; read the newspaper; bought a coat; "
    "mended the chair; drew a map; called a friend; answered the question; forgot the name",
    "A chair has four legs and a back; Letters take two days to arrive; Windows let light into a room; The street is "
    "quiet in the morning; Some people keep every photograph; A key that is lost is never far away; Most boxes are "
    "made of paper; Old clocks lose a minute a day; It is cold near the door; A long walk takes an afternoon; The "
    "list of names was shorter than last year; Not every question has an answer; The answer came a week later",
    "",
)

_PLACES = ("at home", "in the north", "near the town", "in our village", "abroad", "in the old days", "nearby")
_TIMES = ("yesterday", "last summer", "every morning", "in the evening", "a year ago", "on Sunday", "all day", "often")
_FEELINGS = ("proud", "tired", "happy", "curious", "afraid", "surprised", "certain", "impatient")
# {t} and {u} things, {p} person, {a} and {b} actions, {f} a fact, and place, time, feeling.
FRAMES = (
    "{f}.",
    "{f}.",
    "{f}, as the {p} explained.",
    "The {p} {a} {when}.",
    "{When}, the {p} {a} and then {b}.",
    "Nobody knew why the {p} {a}.",
    "I think the {t} was better than the {u}.",
    'What is a {t}? The {p} said: "{f}."',
    "My favorite subject is the {t}, and after that the {u}.",
    "She asked about the {t}, and the {p} talked about it for an hour.",
    "Today I want to write about the {t}.",
    "There is a {t} {where}, and the {p} is {feeling} about it.",
    "When I was young, the {p} {a} {where}.",
    "A book about the {t} lay beside the {u}.",
    "We saw a {t} {when}; the {p} {a}.",
    "It takes years to understand the {t}.",
    "The {t} and the {u} are never far apart.",
    "He {a}, he {b}, and he was {feeling}.",
    "Question: what did the {p} do? Answer: the {p} {a}.",
    "Some say that the {t} matters most; others prefer the {u}.",
    "Here are three things to remember: the {t}, the {u}, and the {p}.",
    "If you ever meet a {p}, ask about the {t}.",
    "Without the {t} there would be no {u}.",
    "Dear friend, {when} the {p} {a}, and I thought of you.",
    "The news {where} was all about the {t}.",
    "They {a} {when}, because {f_lower}.",
    "How does one begin? First read about the {t}, then about the {u}.",
    "The {p} was {feeling} and {a}.",
    "In my opinion every {t} deserves a good {u}.",
    "The story begins {where}, where a {p} {a}.",
)


def concept_text(concept: Concept, documents: int, seed: int) -> list[str]:
    """Documents of a few sentences each on one concept.

    Args:
        concept: What fills the frames.
        documents: How many.
        seed: Equal seeds give equal text.
    """
    rng = np.random.default_rng(seed)
    return [" ".join(_sentence(concept, rng) for _ in range(rng.integers(*_SENTENCES))) for _ in range(documents)]


def _sentence(concept: Concept, rng: np.random.Generator) -> str:
    def pick(among: tuple[str, ...]) -> str:
        return among[int(rng.integers(len(among)))]

    t, u = (concept.things[int(i)] for i in rng.choice(len(concept.things), size=2, replace=False))
    a, b = (concept.actions[int(i)] for i in rng.choice(len(concept.actions), size=2, replace=False))
    fact, when = pick(concept.facts), pick(_TIMES)
    text = pick(FRAMES).format(
        t=t,
        u=u,
        a=a,
        b=b,
        p=pick(concept.people),
        f=fact,
        f_lower=fact[0].lower() + fact[1:],
        when=when,
        When=when[0].upper() + when[1:],
        where=pick(_PLACES),
        feeling=pick(_FEELINGS),
    )
    return text.replace(" a a", " an a").replace(" a e", " an e").replace(" a o", " an o")
