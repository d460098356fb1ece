package fanout

// PlanReads sets from how many evaluators on a map is scanned, and the size of a
// page. Call it before Run.
func (s *Service) PlanReads(separate int, pageRows uint32) {
	s.plan = readPlan{separate, pageRows}
}
