"""The built-in text of `pinfer bench`. It is prose, since the neurons that fire depend on the text."""

TEXT = """\
The ferry left the harbour a little after six, when the light on the water was still grey and the gulls had
not yet found anything to quarrel about. Anna stood at the rail with her collar turned up and counted the
lamps along the quay as they went out, one after another, the way her father had taught her to count them when
she was small. There were fewer now. The fish market had closed two winters ago, and the rope works before
that; what remained was a bakery, the customs house, and a row of sheds where people kept boats that they no
longer sailed.

She was not sad about it. Towns change as rivers do, slowly, and mostly at the bends. Her grandmother
remembered a time when the whole island smelled of tar and smoke, and she had not spoken of it kindly. "We
were always tired," she used to say, "and the soup was always thin." What she missed were the songs. On
Saturdays the men came back with their nets, and somebody would begin, and by the second verse even the old
pilot, who could not hear, would be moving his lips.

The crossing took three hours. In the cabin a boy was reading aloud to his sister from a book about the
planets. Jupiter, he explained, has a storm that is larger than the Earth and has lasted for several hundred
years. The girl wanted to know whether anybody lived in it. Nobody, he said, because there is no ground to
stand on: if you fell into Jupiter you would keep falling, and it would get hotter and darker and heavier,
until you were crushed. She thought about this for a while. Then she asked if there was anything to eat.

Towards nine the wind turned to the west and the engine changed its note. Anna went below, bought a cup of
coffee and a roll with cheese, and opened the letter again. It was written on the paper of a museum, in a
careful, upright hand. They had found the chart, it said, in a drawer that had been locked since 1931,
together with a compass, two photographs and a list of names. They believed that it belonged to her family.
Would she be able to come before the end of the month? The conservator needed a decision, since the ink was
fading, and there was the question of the island marked in the north, which appeared on no other map of that
period and which, as far as anyone could tell, did not exist.

She read the last sentence twice. Outside, the first houses of the mainland rose out of the haze: a chimney, a
church with a green roof, then the long wall of the shipyard with its two yellow cranes. The boy closed his
book. People began to look for their bags and their children, and the deck filled with voices. In 1931 her
great-grandfather had been twenty-four years old, a surveyor's assistant with bad teeth and a good memory, and
he had told everyone who would listen that he had walked on that island, that there was a spring on it, and
white birds without fear, and that one day somebody would have to go back and draw it properly.
"""
