package main

import (
	"fmt"
	"io"
	"math"
	"slices"
	"text/tabwriter"
)

// row is one number of one scenario, once per repetition.
type row struct {
	Scenario string    `json:"scenario"`
	Metric   string    `json:"metric"`
	Unit     string    `json:"unit"`
	Values   []float64 `json:"values"`
	Median   float64   `json:"median"`
	Least    float64   `json:"least"`
	Most     float64   `json:"most"`
}

// results collects rows in the order in which they first come.
type results struct{ rows []row }

// add adds the value of one repetition.
func (r *results) add(scenario, metric, unit string, value float64) {
	i := slices.IndexFunc(r.rows, func(row row) bool { return row.Scenario == scenario && row.Metric == metric })
	if i < 0 {
		i = len(r.rows)
		r.rows = append(r.rows, row{Scenario: scenario, Metric: metric, Unit: unit})
	}
	row := &r.rows[i]
	row.Values = append(row.Values, value)
	row.Median, row.Least, row.Most = quantile(row.Values, 0.5), slices.Min(row.Values), slices.Max(row.Values)
}

// write prints the table.
func (r *results) write(out io.Writer) error {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "scenario\tmetric\tmedian\trange\tunit")
	scenario := ""
	for _, row := range r.rows {
		name := row.Scenario
		if name == scenario {
			name = ""
		}
		scenario = row.Scenario
		fmt.Fprintf(w, "%s\t%s\t%s\t[%s – %s]\t%s\n", name, row.Metric,
			number(row.Median), number(row.Least), number(row.Most), row.Unit)
	}
	return w.Flush()
}

// number prints three significant digits, without an exponent.
func number(v float64) string {
	if v == 0 {
		return "0"
	}
	digits := max(0, 2-int(math.Floor(math.Log10(math.Abs(v)))))
	return fmt.Sprintf("%.*f", digits, v)
}

// quantile returns the value at fraction q of the sorted values, the lower of two
// for q = 0.5 of an even number; 0 of none.
func quantile(values []float64, q float64) float64 {
	if len(values) == 0 {
		return 0
	}
	sorted := slices.Sorted(slices.Values(values))
	return sorted[int(q*float64(len(sorted)-1))]
}
