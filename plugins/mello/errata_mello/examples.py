"""Worked examples of the loop, in the format that MeLLo's parser reads (wording of our own)."""

QUESTION = "Question: "
SUBQUESTION = "Subquestion: "
RETRIEVED = "Retrieved fact: "
FINAL = "Final answer: "

EXAMPLES = (
    """Question: On which continent is the country whose national team Diego Maradona played for?
Subquestion: Which country's national team did Diego Maradona play for?
Generated answer: Diego Maradona played for the national team of Argentina.
Retrieved fact: Diego Maradona played for the national team of Norway.
Retrieved fact contradicts generated answer, so the intermediate answer is: Norway
Subquestion: On which continent is Norway?
Generated answer: Norway is on the continent of Europe.
Retrieved fact: Lake Victoria is on the continent of Asia.
Retrieved fact does not contradict generated answer, so the intermediate answer is: Europe
Final answer: Europe

""",
    """Question: Who wrote the novel that the film Blade Runner is based on?
Subquestion: Which novel is the film Blade Runner based on?
Generated answer: Blade Runner is based on Do Androids Dream of Electric Sheep?
Retrieved fact: The film Solaris is based on a play.
Retrieved fact does not contradict generated answer, so the intermediate answer is: Do Androids \
Dream of Electric Sheep?
Subquestion: Who wrote Do Androids Dream of Electric Sheep?
Generated answer: Do Androids Dream of Electric Sheep? was written by Philip K. Dick.
Retrieved fact: Do Androids Dream of Electric Sheep? was written by Agatha Christie.
Retrieved fact contradicts generated answer, so the intermediate answer is: Agatha Christie
Final answer: Agatha Christie

""",
    """Question: What is the capital of the country where the company that makes the Corolla sits?
Subquestion: Which company makes the Corolla?
Generated answer: The Corolla is made by Toyota.
Retrieved fact: The Corolla is made by Renault.
Retrieved fact contradicts generated answer, so the intermediate answer is: Renault
Subquestion: In which country does Renault sit?
Generated answer: Renault sits in France.
Retrieved fact: The company Siemens sits in Brazil.
Retrieved fact does not contradict generated answer, so the intermediate answer is: France
Subquestion: What is the capital of France?
Generated answer: The capital of France is Paris.
Retrieved fact: The capital of Chile is Lima.
Retrieved fact does not contradict generated answer, so the intermediate answer is: Paris
Final answer: Paris

""",
    """Question: Which language is spoken in the city where Marie Curie was born?
Subquestion: In which city was Marie Curie born?
Generated answer: Marie Curie was born in Warsaw.
Retrieved fact: Marie Curie was born in Lisbon.
Retrieved fact contradicts generated answer, so the intermediate answer is: Lisbon
Subquestion: Which language is spoken in Lisbon?
Generated answer: Portuguese is spoken in Lisbon.
Retrieved fact: The language of Oslo is Greek.
Retrieved fact does not contradict generated answer, so the intermediate answer is: Portuguese
Final answer: Portuguese

""",
)
