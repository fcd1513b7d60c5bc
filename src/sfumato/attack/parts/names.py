"""What else some harmless things are called: near synonyms, and names in five other languages."""

from __future__ import annotations

from collections.abc import Mapping

LANGUAGES = ("es", "fr", "de", "it", "pt")
"""Spanish, French, German, Italian, Portuguese, in the order of `NAMES`."""

SYNONYMS: Mapping[str, tuple[str, ...]] = {
    "circle": ("disc", "ring", "round shape"),
    "square": ("box", "equal-sided rectangle", "quadrate"),
    "triangle": ("three-sided shape", "wedge", "delta"),
    "star": ("asterisk", "pentagram", "five-pointed shape"),
    "heart": ("love symbol", "valentine", "cardioid"),
    "moon": ("crescent", "lunar shape", "half-moon"),
    "cross": ("plus sign", "crossed bars", "crux"),
    "arrow": ("pointer", "dart", "direction sign"),
    "house": ("home", "cottage", "building with a roof"),
    "tree": ("oak", "trunk with a crown", "leafy plant"),
    "fish": ("trout", "finned swimmer", "aquatic animal"),
    "mushroom": ("toadstool", "fungus", "champignon"),
    "red": ("scarlet", "crimson", "vermilion"),
    "orange": ("tangerine", "amber", "apricot"),
    "yellow": ("golden", "lemon", "canary"),
    "green": ("emerald", "verdant", "olive"),
    "cyan": ("turquoise", "aqua", "teal"),
    "blue": ("azure", "navy", "cobalt"),
    "purple": ("violet", "mauve", "plum"),
    "pink": ("rose", "salmon", "magenta"),
    "church": ("chapel", "cathedral", "house of worship"),
    "parachute": ("canopy of a skydiver", "skydiving chute", "paraglider"),
    "dog": ("hound", "puppy", "canine"),
    "cat": ("kitten", "feline", "tomcat"),
}

NAMES: Mapping[str, tuple[str, str, str, str, str]] = {
    "circle": ("círculo", "cercle", "Kreis", "cerchio", "círculo"),
    "square": ("cuadrado", "carré", "Quadrat", "quadrato", "quadrado"),
    "triangle": ("triángulo", "triangle", "Dreieck", "triangolo", "triângulo"),
    "star": ("estrella", "étoile", "Stern", "stella", "estrela"),
    "heart": ("corazón", "cœur", "Herz", "cuore", "coração"),
    "moon": ("luna", "lune", "Mond", "luna", "lua"),
    "cross": ("cruz", "croix", "Kreuz", "croce", "cruz"),
    "arrow": ("flecha", "flèche", "Pfeil", "freccia", "flecha"),
    "house": ("casa", "maison", "Haus", "casa", "casa"),
    "tree": ("árbol", "arbre", "Baum", "albero", "árvore"),
    "fish": ("pez", "poisson", "Fisch", "pesce", "peixe"),
    "mushroom": ("seta", "champignon", "Pilz", "fungo", "cogumelo"),
    "red": ("rojo", "rouge", "rot", "rosso", "vermelho"),
    "orange": ("naranja", "orange", "orange", "arancione", "laranja"),
    "yellow": ("amarillo", "jaune", "gelb", "giallo", "amarelo"),
    "green": ("verde", "vert", "grün", "verde", "verde"),
    "cyan": ("cian", "cyan", "cyanblau", "ciano", "ciano"),
    "blue": ("azul", "bleu", "blau", "blu", "azul"),
    "purple": ("morado", "violet", "lila", "viola", "roxo"),
    "pink": ("rosa", "rose", "rosa", "rosa", "rosa"),
    "church": ("iglesia", "église", "Kirche", "chiesa", "igreja"),
    "parachute": ("paracaídas", "parachute", "Fallschirm", "paracadute", "paraquedas"),
    "dog": ("perro", "chien", "Hund", "cane", "cachorro"),
    "cat": ("gato", "chat", "Katze", "gatto", "gato"),
}
