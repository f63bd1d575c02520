# Draws where a step's time went: one bar a phase, to scale. Input: the file of `kiln run --timings`.
def pad($n): tostring | . + (" " * ([0, $n - length] | max));
def lpad($n): tostring | (" " * ([0, $n - length] | max)) + .;
(.phases | map(.milliseconds) | add) as $total
| .phases[]
| ([1, (.milliseconds / $total * 50 | round)] | max) as $width
| "  \(.name | pad(12)) \((.milliseconds | round) | lpad(8)) ms  \("█" * $width)"
