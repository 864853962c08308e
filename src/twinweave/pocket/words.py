"""The words of the pocket world: names, values of facts, and the words that skills work on.

Every word is one token and belongs to one list only. Knows nothing about who has which value.
"""


def _split(text: str) -> list[str]:
    return text.split()


FIRST_NAMES = _split("""
Ada Alma Anton Arlo Astrid Basil Beata Boris Bruno Carla Cato Celia Cyril Dagny Dario Delia Dora Edgar Edith
Elias Elsa Emil Enid Ezra Fabian Fanny Felix Flora Freya Gideon Gilda Greta Gustav Hana Hector Hilda Hugo Ida
Igor Ines Irma Isaac Ivo Jasper Joan Jonas Judith Julius Kaja Karl Kira Klara Lars Leda Leo Lidia Linus Lotte
Lucian Mabel Magnus Mara Marek Mina Mona Nadia Nestor Nils Nora Odette Olaf Olga Oscar Otto Paula Pavel Petra
Piers Quentin Ralf Rhea Roland Rosa Rufus Sabina Saul Selma Sigrid Silas Stella Tamar Theo Thora Ulla Ursula
Vera Viktor Wanda Xenia Yara
""")

LAST_NAMES = _split("""
Abbot Alder Amory Ashdown Barlow Beck Birch Blythe Bolton Bramley Brandt Burnet Calder Carver Clough Colby
Corbin Crane Dalton Darby Denholm Drake Dunmore Eaton Elwood Erskine Fallon Farrow Fenwick Finch Flint Foster
Garland Gilroy Gorman Grover Hadley Halden Harker Hawke Hazel Holt Hurst Ingram Jarvis Jessop Keats Kemble
Kirby Knox Lambert Langley Larkin Linden Lockwood Lowell Marlow Mercer Milton Morley Nash Naylor Norden
Oakley Orchard Osborn Paget Parrish Pembroke Perrin Prescott Quill Radley Ramsey Redfern Ridley Rowan Rushton
Sawyer Selby Shaw Sorrel Stanton Sutter Talbot Tanner Thorne Tilbury Travers Tyndall Upton Vance Wakefield
Walton Warwick Weaver Whitby Winslow Wyatt Yates
""")

TOWNS = _split("""
Amberley Brackwater Coldharbour Dunwick Eastmere Farholm Glenmoor Highcliff Ironbridge Juniper Kingsport
Larkhill Mistvale Northgate Oldcastle Pinecrest Quarryton Ravenford Saltmarsh Thornbury Underhill Valebrook
Westhaven Yarrow Zennor Ashcombe Bellhaven Copperfield Driftwood Elmstead Foxglove Greystone Hollowell
Inverloch Lowmoor Marblehead Nettleton Otterburn Rosewater Stonebridge
""")

JOBS = _split("""
baker barber beekeeper blacksmith bookbinder brewer butcher carpenter chemist clockmaker cobbler cook dentist
doctor farmer fisher florist gardener glazier goldsmith hatter judge librarian locksmith mason miller miner
nurse painter pilot plumber poet porter potter sailor shepherd singer surgeon tailor teacher
""")

PETS = _split("""
badger beaver budgie camel canary cat cobra crab donkey duck falcon ferret finch fox frog gecko goat goose
hamster hare hen horse lizard llama monkey mouse newt parrot pigeon pony rabbit raven sheep snail spider swan
toad tortoise turkey weasel
""")

COLOURS = _split("""
amber beige black blue bronze brown coral cream crimson cyan gold green grey indigo ivory jade khaki lavender
lilac lime magenta maroon mauve navy ochre olive peach pink plum purple red ruby scarlet silver teal
turquoise umber violet white yellow
""")

LANDS = _split("Arvenia Borland Cassia Dravia Estmark Fjordland Galdor Hestia")

RIVERS = _split("Aller Brennet Cald Dove Eske Fleet Gander Humble Isk Jarrow Kenn Lune")

GOODS = _split("""
bells boats bricks candles carpets cheese cider clocks glass gloves honey kites lace lamps linen paper
pottery rope salt soap
""")

# What skills such as copying and reversing work on.
WORDS = _split("""
acorn anchor apron arrow axe bag ball barn basin basket bean bed bell belt bench berry blade blanket board
bolt bone book boot bottle bowl box branch bread brick bridge broom brush bucket button cake candle cap card
carpet chain chair chalk cheek chest clay cloak cloud coat coin comb cork corn crown cup curtain dam desk
dice dish door drum dust ear egg eye fan feather fence field fig flag floor flute fork frame garden gate
glove grain grass hammer hand harp hat hill hook horn house ink island jar jug key kite knee knife ladder
lake lamp leaf lemon lid light log loaf map mast meadow mill mirror moon nail neck needle nest net nut oar
onion oven
""")

# Without A, which the usual normalisation of answers would drop as an article.
LETTERS = list("BCDEFGHIJKLMNOPQRSTUVWXYZ")

LARGEST_TERM = 12
NUMBERS = [str(number) for number in range(2 * LARGEST_TERM + 1)]
